"""A filter that learns from views which are always new, and the collages that these are; a CPU stands for the GPU."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.detection.collage import CROP, KINDS, MOSAIC, PAIR, WHOLE, Collage, Layouts
from headrace.models.detection.distil import Views, distil
from headrace.models.detection.presence import Presence
from headrace.models.detection.scenes import Part, look
from headrace.models.exceptions import DataError
from headrace.models.measure import load_pixels
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from own_detector import SIZE, make_scenes

SOURCE = Source("own_detector:Squares", "detection", size=SIZE, labels=("red", "blue"))
AT = "stem"
RED = 0
FILL = (9, 9, 9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    return sorted((make_scenes(tmp_path_factory.mktemp("scenes"), 90) / "images").iterdir())


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(SOURCE)


def plain(layouts: Layouts) -> Layouts:
    """The same, with colours as they are and nothing shining through."""
    colours = torch.tensor([1.0, 0.0]).expand_as(layouts.colours)
    return replace(layouts, colours=colours, blend=(layouts.blend[0], torch.zeros_like(layouts.blend[1])))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Collage:
    """Of plain photographs, whose red says which one it is."""
    folder = tmp_path_factory.mktemp("plain")
    for i in range(20):
        Image.new("RGB", (200 + 5 * i, 150), (50 + 10 * i, 0, 0)).save(folder / f"{i:02}.png")
    return Collage(sorted(folder.iterdir()), FILL, CPU)


def test_every_tile_shows_its_own_photograph_and_bars_are_grey(tiles):
    layouts = plain(tiles.layouts(np.random.default_rng(0), 200))
    pixels = tiles.draw(layouts, 96).numpy()
    counts = dict.fromkeys((WHOLE, PAIR, MOSAIC), 0)
    for i in range(200):
        left, top, right, bottom = (round(float(v) * 96) for v in layouts.scene[i])
        x, y = (round(float(v) * 96) for v in layouts.middle[i])
        expected = np.full((96, 96), 9)
        which = layouts.photograph[i].numpy() * 10 + 50
        for tile, (begin_x, end_x, begin_y, end_y) in enumerate(
            ((left, x, top, y), (x, right, top, y), (left, x, y, bottom), (x, right, y, bottom))
        ):
            expected[min(begin_y, bottom) : min(end_y, bottom), min(begin_x, right) : min(end_x, right)] = which[tile]
        wrong = (pixels[i, ..., 0] != expected).mean()
        assert wrong < 0.04, "but for a row or column at the edges, which fall between two pixels"
        shown = len(set(np.unique(pixels[i, 4:-4, 4:-4, 0])) - {9})
        counts[WHOLE if shown == 1 else PAIR if shown == 2 else MOSAIC] += 1
    # A photograph may be drawn twice; a part of one looks like a whole one here.
    for kind, share in ((WHOLE, KINDS[WHOLE] + KINDS[CROP]), (PAIR, KINDS[PAIR]), (MOSAIC, KINDS[MOSAIC])):
        assert abs(counts[kind] / 200 - share) < 0.1


def test_a_whole_photograph_is_what_the_device_would_see_of_it(paths, backbone):
    """Mirrored or not, but for interpolation: a camera's frame is averaged where it is made smaller."""
    how = backbone.preprocessing
    collage = Collage(paths[:12], how.fill, CPU)
    layouts = plain(collage.layouts(np.random.default_rng(1), 80))
    pixels = collage.draw(layouts, SIZE).numpy().astype(int)
    found = 0
    for i in range(80):
        one = layouts.middle[i].min() > 1 and layouts.corner[i, 0].abs().max() < 1e-3
        if not one or abs(float(layouts.scale[i, 0]) - 96) > 0.1:
            continue
        seen = load_pixels(paths[int(layouts.photograph[i, 0])], how).astype(int)
        seen = seen[:, ::-1] if layouts.mirrored[i, 0] else seen
        bars = (seen == how.fill[0]).all(2)
        assert (pixels[i][bars] == how.fill[0]).all()
        assert np.abs(pixels[i] - seen).mean() < 4
        found += 1
    assert found >= 10


def test_the_same_scenes_at_another_size(paths):
    collage = Collage(paths[:12], FILL, CPU)
    layouts = collage.layouts(np.random.default_rng(2), 16)
    small, large = (collage.draw(layouts, size).float() for size in (48, 96))
    halved = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (small - halved).abs().mean() < 5
    other = collage.draw(collage.layouts(np.random.default_rng(3), 16), 48).float()
    assert (small - other).abs().mean() > 15


def test_a_broken_photograph_is_named(tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        Collage([broken], FILL, CPU)


def test_a_filter_learns_from_new_views(paths, backbone):
    """From photographs that it is not judged on; and what is stored of it says the same as what has learned."""
    torch.manual_seed(0)
    channels, rows, _ = backbone.shape(AT)
    filters = {AT: Presence(channels, rows, 16, 2)}
    rng = np.random.default_rng(0)
    views = Views(backbone, filters, Collage(paths[:60], backbone.preprocessing.fill, CPU), [RED], drawn=32, latest=256)
    shares: list[float] = []
    learner = distil(
        views,
        filters,
        backbone.task.confident,
        lambda made: made / 1600,
        rng,
        lambda made, share, losses: shares.append(share),
        batch=32,
        steps=2,
    )[AT]
    assert views.made == 1600 and shares == sorted(shares) and shares[-1] < 1
    seen = look(backbone, {AT: filters[AT].pooled}, [Part(paths[60:], 2)], [RED], 0)
    pooled = torch.from_numpy(seen.pooled[AT]).float()
    learner.presence.load_state_dict(learner.average())
    with torch.no_grad():
        before = learner.presence.eval().score(pooled)
        presence = learner.finish()
        scores = presence.score(pooled)
    assert torch.allclose(before, scores, atol=0.05), "folding changes nothing but rounding"
    holding, empty = scores[torch.from_numpy(seen.holds)], scores[torch.from_numpy(~seen.holds)]
    area = float((holding[:, None] > empty).float().mean())
    assert area > 0.95, area
