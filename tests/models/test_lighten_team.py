"""Heads are made light by several processes together."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.bundle import Bundle
from headrace.models.exceptions import DataError
from headrace.models.learning.course import Lightening, Views
from headrace.models.learning.lighten import lighten
from headrace.models.learning.team import Team
from headrace.models.measure import find_pictures
from headrace.models.split import choose, fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source

BACKBONE = Source("timm/mobilenetv2_035", seed=1, size=64)
SPLIT = "blocks.1"
FEW = Lightening(steps=4, batch=8, hidden=(8, 16, 16))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> list[Path]:
    return find_pictures(noise_pictures)


@pytest.fixture(scope="module")
def bundle(photographs) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(load_backbone(BACKBONE), (SPLIT,), photographs[:60], photographs[60:64])


def test_each_process_has_its_share_of_a_steps_views(bundle, photographs):
    backbone, how = load_backbone(BACKBONE), Lightening(steps=1, batch=6)
    whole = Views(backbone, photographs, how)
    first, second = (Views(backbone, photographs, how, Team(rank, 2, CPU)) for rank in range(2))
    assert torch.equal(torch.stack((first.at(5), second.at(5)), 1).flatten(0, 1), whole.at(5))
    assert torch.equal(second.at(-1), whole.at(-1))  # what is measured is the same for all
    with pytest.raises(DataError, match="6 views a step are not the same number for each of 4 processes"):
        Views(backbone, photographs, how, Team(0, 4, CPU))


def test_two_processes_learn_what_one_does(bundle, noise_pictures, tmp_path):
    """Through the command, which writes one bundle."""
    bundle.save(tmp_path / "bundle")
    options = ["--bundle", tmp_path / "bundle", "--at", SPLIT, "--photographs", noise_pictures, "--fitted", "100"]
    options += ["--held-out", "4", "--steps", str(FEW.steps), "--batch", str(FEW.batch), "--hidden", "8,16,16"]
    options += ["--output", tmp_path / "made", "--work", tmp_path / "work"]
    team = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*team, "-m", "headrace.cli", "lighten", *map(str, options)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"{SPLIT} lighter") == 1
    made = Bundle.load(tmp_path / "made")
    fit_on, measured_on = choose(noise_pictures, 100, 4, 0)
    paths = [p for p in find_pictures(noise_pictures) if p not in set(measured_on) - set(fit_on)]
    alone = lighten(backbone_of(bundle), bundle, [SPLIT], paths, FEW, tmp_path / "alone")
    assert made.learned.keys() == alone.learned.keys()
    for name, weight in alone.learned.items():
        np.testing.assert_allclose(made.learned[name], weight, rtol=0, atol=2e-3, err_msg=name)
