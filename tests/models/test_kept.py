"""Stages of a measurement hang on what their split point has, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from headrace.models.bundle import Bundle
from headrace.models.evaluation.kept import split_digest

COMMITTED = Path(__file__).parents[2] / "models" / "bundles" / "efficientnet_lite0"


def test_what_another_split_point_learned_voids_nothing():
    bundle = Bundle.load(COMMITTED)

    def changed(prefix: str) -> dict[str, bool]:
        learned = {k: np.zeros_like(v) if k.startswith(prefix) else v for k, v in bundle.learned.items()}
        other = bundle.with_learned(learned)
        assert other.fingerprint != bundle.fingerprint
        names = ("blocks.2.0", "slim-25", "slim-100", "blocks.3")
        return {name: split_digest(other, name) != split_digest(bundle, name) for name in names}

    assert changed("blocks.2.0/head/") == {"blocks.2.0": True, "slim-25": False, "slim-100": False, "blocks.3": False}
    assert changed("slim/tail/") == {"blocks.2.0": False, "slim-25": True, "slim-100": True, "blocks.3": False}


def test_measured_accuracies_and_times_void_nothing():
    bundle = Bundle.load(COMMITTED)
    points = tuple(replace(p, accuracy=0.5, edge_share=0.5) for p in bundle.operating_points)
    other = replace(bundle, operating_points=points)
    assert all(split_digest(other, s.name) == split_digest(bundle, s.name) for s in bundle.splits)


def test_its_repair_and_its_tables_void_it():
    bundle = Bundle.load(COMMITTED)
    bare = replace(bundle, repair={})
    assert split_digest(bare, "blocks.2.0") != split_digest(bundle, "blocks.2.0")
    assert split_digest(bare, "blocks.3") == split_digest(bundle, "blocks.3")
    gains = {**bundle.tensors, "blocks.3/gains": 2 * bundle.tensors["blocks.3/gains"]}
    assert split_digest(replace(bundle, tensors=gains), "blocks.3") != split_digest(bundle, "blocks.3")
