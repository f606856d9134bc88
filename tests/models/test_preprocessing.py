"""Pictures into squares, and places in a square back into the picture."""

from pathlib import Path

import headrace
import numpy as np
import pytest
import torch
from headrace.models.backbones import Pixels
from headrace.models.bundle import BackboneSpec, Bundle, Preprocessing
from headrace.models.exceptions import BundleError
from headrace.models.preprocessing import placement, prepare
from PIL import Image

COMMITTED = Path(headrace.__file__).parent / "models" / "bundles" / "efficientnet_lite0"
HOW = {
    "crop": Preprocessing(40, 32, 127.0, 128.0),
    "stretch": Preprocessing(32, 32, 127.0, 128.0, "stretch", "bilinear"),
    "letterbox": Preprocessing(32, 32, 0.0, 255.0, "letterbox", "bilinear", (127, 120, 3)),
}


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 32), (200, 20), (7, 5)])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_a_mark_in_the_picture_is_where_the_placement_says(how, size):
    """A bright dot in a dark picture: its centre in the square, mapped back, is its centre in the picture."""
    width, height = size
    for x, y in ((width // 2, height // 2), (width * 2 // 5, height * 2 // 5)):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y, x] = 255
        square = prepare(Image.fromarray(picture), how).astype(float)
        if how.fit == "letterbox":
            place = placement(width, height, how)
            left, top = max(place.left, 0), max(place.top, 0)
            square = np.where(np.arange(32)[None, :, None] < left, 0, square)
            square = np.where(np.arange(32)[:, None, None] < top, 0, square)
            square[top + round(height * place.down) :] = 0
            square[:, left + round(width * place.across) :] = 0
        weight = square.sum(2)
        if weight.sum() < 20:
            continue  # scaled away or cut off
        column = (weight.sum(0) * (np.arange(32) + 0.5)).sum() / weight.sum()
        row = (weight.sum(1) * (np.arange(32) + 0.5)).sum() / weight.sum()
        left, top, _, _ = placement(width, height, how).to_picture(column, row, column, row)
        tolerance = max(1.0, 1.2 * max(size) / 32)
        assert abs(left - (x + 0.5)) <= tolerance and abs(top - (y + 0.5)) <= tolerance


def test_corners_of_the_picture_map_to_themselves():
    for how in (HOW["stretch"], HOW["letterbox"]):
        place = placement(640, 480, how)
        left, top = place.left, place.top
        right, bottom = left + 640 * place.across, top + 480 * place.down
        assert place.to_picture(left, top, right, bottom) == pytest.approx((0, 0, 640, 480))
        assert max(right - left, bottom - top) == 32


def test_a_letterbox_keeps_the_shape_and_fills_the_rest():
    square = prepare(Image.new("RGB", (100, 50), (200, 10, 90)), HOW["letterbox"])
    assert (square[8:24] == (200, 10, 90)).all()
    assert (square[:8] == (127, 120, 3)).all() and (square[24:] == (127, 120, 3)).all()


def test_channels_may_have_their_own_mean_and_deviation():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    one = Pixels(Preprocessing(4, 4, 127.0, 128.0))(pixels)
    assert torch.equal(one, (pixels.permute(0, 3, 1, 2).float() - 127) / 128)
    each = Pixels(Preprocessing(4, 4, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))(pixels)
    for c in range(3):
        assert torch.allclose(each[:, c], (pixels[..., c].float() - (c + 1)) / (c + 4))


def test_new_fields_leave_older_bundles_alone():
    """The committed bundle was written before them: its fingerprint is checked as it is loaded."""
    bundle = Bundle.load(COMMITTED)
    assert bundle.preprocessing == Preprocessing(256, 224, 127.0, 128.0, "crop", "bicubic", (0, 0, 0))
    assert "fit" not in bundle.manifest()["preprocessing"]
    assert "weights" not in bundle.manifest()["backbone"]


def test_new_fields_come_back_from_disk(small_bundle, tmp_path):
    from dataclasses import replace

    how = Preprocessing(20, 20, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "letterbox", "lanczos", (1, 2, 3))
    spec = BackboneSpec("timm/x", "timm", "ab", "random:3")
    bundle = replace(small_bundle, preprocessing=how, backbone=spec)
    bundle.save(tmp_path)
    again = Bundle.load(tmp_path)
    assert (again.preprocessing, again.backbone) == (how, spec)
    assert again.fingerprint != small_bundle.fingerprint


@pytest.mark.parametrize(
    "fields", [(10, 20, 0.0, 1.0), (20, 0, 0.0, 1.0), (20, 20, 0.0, 1.0, "squeeze"), (20, 20, 0.0, 1.0, "crop", "x")]
)
def test_nonsense_is_refused(fields):
    with pytest.raises(BundleError):
        Preprocessing(*fields)
