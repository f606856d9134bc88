"""What a filter learns from: views of photographs, and a look at them that goes on where it was cut off."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.bundle import Bundle
from headrace.models.command_line import COMMITTED_DETECTION
from headrace.models.detection import scenes as looked
from headrace.models.detection.mosaic import pair
from headrace.models.detection.scenes import Part, Watcher, look, views
from headrace.models.exceptions import DataError
from headrace.models.measure import load_pixels
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source

sys.path.insert(0, str(Path(__file__).parent))

from own_detector import SIZE, make_scenes

SOURCE = Source("own_detector:Squares", "detection", size=SIZE, labels=("red", "blue"))
AT = "stem"
RED = 0


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    return sorted((make_scenes(tmp_path_factory.mktemp("scenes"), 24) / "images").iterdir())


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(SOURCE)


def test_views_are_the_same_again_and_of_four_kinds(paths, backbone):
    how = backbone.preprocessing
    part = Part(paths[:3], 4)
    first, again, other = (list(views(part, how, seed)) for seed in (1, 1, 2))
    assert len(first) == len(part) == 12 and all(v.shape == (SIZE, SIZE, 3) and v.dtype == np.uint8 for v in first)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    alike = [bool((a == b).all()) for a, b in zip(first, other, strict=True)]
    assert alike == [True, False, False, False] * 3, "the photographs are the same with any seed, nothing else is"
    assert (first[4] == load_pixels(paths[1], how)).all()
    mirrored = list(views(Part(paths[:3], 4, mirrored=True), how, 1))
    kinds = {"as it was": 0, "mirrored": 0}
    for a, b in zip(first, mirrored, strict=True):
        kinds["as it was" if (a == b).all() else "mirrored"] += 1
        assert (a == b).all() or (a[:, ::-1] == b).all()
    assert all(kinds.values())


def test_a_pair_shows_two_photographs(paths, backbone, tmp_path):
    how = backbone.preprocessing
    scene = pair(paths, how, 0, 3)
    assert scene.shape == (SIZE, SIZE, 3) and (scene == pair(paths, how, 0, 3)).all()
    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        pair([broken], how, 0, 0)


def test_each_place_is_told_the_best_candidate_whose_centre_it_holds(paths, backbone):
    seen = look(backbone, {AT: lambda features: features}, [Part(paths)], [RED], 0)
    with torch.no_grad():
        scores, corners, *_ = backbone.uncut(
            torch.from_numpy(np.stack([load_pixels(paths[5], backbone.preprocessing)]))
        )
    _, rows, columns = seen.places[AT].shape
    expected = np.zeros((rows, columns), np.float32)
    for score, (left, top, right, bottom) in zip(scores[0, :, RED].tolist(), corners[0].tolist(), strict=True):
        x = min(max(int((left + right) / 2 / SIZE * columns), 0), columns - 1)
        y = min(max(int((top + bottom) / 2 / SIZE * rows), 0), rows - 1)
        expected[y, x] = max(expected[y, x], score)
    assert np.allclose(seen.places[AT][5], expected, atol=1e-6)
    assert np.allclose(seen.places[AT].max((1, 2)), seen.best, atol=1e-6)
    assert 0 < seen.holds.sum() < len(paths) and (seen.holds == (seen.best >= backbone.task.confident)).all()


def test_a_look_that_was_cut_off_goes_on(paths, backbone, tmp_path, monkeypatch):
    """What a killed run had looked at is not looked at again, and the end is the same."""
    parts = [Part(paths[:6], 2), Part(paths[6:], 1, mirrored=True)]
    pooled = {AT: lambda features: features}
    how = {"backbone": backbone, "pooled": pooled, "parts": parts, "interest": [RED], "seed": 0}
    whole = look(**how)
    monkeypatch.setattr(looked, "SAVE", 8)

    def kill(done: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(**how, work=tmp_path, note=kill)
    done: list[int] = []
    resumed = look(**how, work=tmp_path, note=done.append)
    assert done == [24, 30]
    assert (resumed.best == whole.best).all() and (resumed.pooled[AT] == whole.pooled[AT]).all()
    assert (resumed.places[AT] == whole.places[AT]).all()
    again: list[int] = []
    look(**how, work=tmp_path, note=again.append)
    assert again == [], "all of it had been looked at"
    look(**(how | {"interest": [1]}), work=tmp_path, note=again.append)
    assert again[-1] == 30, "of another class nothing had"


def test_behind_a_head_that_was_learned_it_sees_what_the_device_computes():
    """In the committed detector: `slim-25` is its own head, `pool5` the backbone's."""
    own = backbone_of(Bundle.load(COMMITTED_DETECTION))
    watcher = Watcher(own, {name: lambda features: features for name in ("slim-25", "pool5")}, [0])
    pixels = torch.randint(0, 256, (2, 416, 416, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = watcher([pixels])
    with torch.inference_mode():
        for name in ("slim-25", "pool5"):
            assert torch.equal(found[name], own.head(name)(pixels)[0].half())
            assert found[f"{name}/places"].shape == found[name][:, 0].shape
        scores, *_ = own.uncut(pixels)
    torch.testing.assert_close(found["best"], scores[..., 0].amax(1), rtol=1e-4, atol=1e-5)
