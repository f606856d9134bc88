"""The demo's input is there, real, and as long as it says."""

from __future__ import annotations

import itertools

import av
import numpy as np
import pytest
from headrace.bench import material
from headrace.models.exceptions import DataError
from PIL import Image


def test_the_video_has_the_frames_that_are_counted_on() -> None:
    with av.open(str(material.video())) as container:
        assert sum(1 for _ in container.decode(video=0)) == material.VIDEO_FRAMES


def test_photographs_become_slow_pans(tmp_path) -> None:
    folder = material.write_photographs(tmp_path / "photographs")
    files = sorted(folder.iterdir())
    assert len(files) == material.FRAMES - material.VIDEO_FRAMES
    first = [np.asarray(Image.open(file), np.float32) for file in files[: material.FRAMES_A_PHOTOGRAPH + 1]]
    assert {frame.shape for frame in first} == {(288, 288, 3)}
    steps = [float(np.abs(a - b).mean()) for a, b in itertools.pairwise(first)]
    # Neighbours differ, but less than two photographs do.
    assert min(steps[:-1]) > 0
    assert max(steps[:-1]) < steps[-1]


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match="pip install no-such-package"):
        material._package_file("no_such_module", "no-such-package", "data/x.png")
