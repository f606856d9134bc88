"""Several maps of one cut, packed into one and back."""

from pathlib import Path

import pytest
import torch
from headrace.models.cutting.maps import MAX_CHANNELS, Pack, Packing, Unpack
from headrace.models.exceptions import BackboneError
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(3, 16), st.integers(3, 16)), min_size=1, max_size=4).map(
    tuple
)


@given(shapes, st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_packing_loses_nothing(maps: tuple[tuple[int, int, int], ...], batch: int) -> None:
    packing = Packing(maps)
    given_maps = [torch.randn(batch, *shape) for shape in maps]
    packed = Pack(packing)(*given_maps)
    assert packed.shape == (batch, *packing.packed)
    for before, after in zip(given_maps, Unpack(packing)(packed), strict=True):
        assert torch.equal(before, after)


def test_a_single_map_is_left_as_it_is() -> None:
    features = torch.randn(2, 8, 14, 14)
    assert torch.equal(Pack(Packing([(8, 14, 14)]))(features), features)


def test_places_become_channels_of_the_coarsest_grid() -> None:
    assert Packing([(40, 28, 28), (96, 14, 14)]).packed == (256, 14, 14)
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    packed = Pack(Packing([(1, 4, 4), (1, 2, 2)]))(fine, torch.zeros(1, 1, 2, 2))
    assert packed[0, :4, 0, 0].tolist() == [0, 1, 4, 5]


def test_gradients_pass() -> None:
    packing = Packing([(2, 5, 5), (3, 3, 3)])
    packed = torch.randn(1, *packing.packed, requires_grad=True)
    sum(m.sum() for m in Unpack(packing)(packed)).backward()
    assert packed.grad is not None
    # What is padding has no influence.
    assert 0 < packed.grad.count_nonzero() < packed.numel()


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(BackboneError, match="8 times apart"):
        Packing([(8, 56, 56), (64, 1, 1)])
    with pytest.raises(BackboneError, match=str(MAX_CHANNELS)):
        Packing([(256, 56, 56), (256, 14, 14)])


SKIPPING = '''
from torch import nn, cat
from torch.nn.functional import interpolate

class Skipping(nn.Module):
    """A deep branch beside an early map that is needed again at the end: every cut inside crosses both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 1, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x):
        early = self.stem(x)
        deep = self.deep(self.down(early))
        return self.last(cat([early, interpolate(deep, scale_factor=2)], 1))
'''


def test_a_cut_that_two_maps_cross_is_packed_and_joins_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skipping_model.py").write_text(SKIPPING)
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = load_backbone(Source("skipping_model:Skipping", "classification", seed=0, size=64))
    several = [c for c in backbone.cuts if len(c.maps) == 2]
    assert several, backbone.split_points
    cut = several[0]
    assert backbone.packing(cut.name).packed == (4 * 4 + 8, 8, 8)
    assert backbone.prove(cut.name) < 1e-5
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    (features,) = backbone.head(cut.name)(pixels)
    assert features.shape == (2, 24, 8, 8)
    joined, uncut = backbone.tail(cut.name)(features), backbone.uncut(pixels)
    assert torch.allclose(joined[0], uncut[0], atol=1e-6)
    single = next(c for c in backbone.cuts if len(c.maps) == 1)
    (from_there,) = backbone.between(single.name, cut.name)(*backbone.head(single.name)(pixels))
    assert torch.allclose(from_there, features, atol=1e-5)
