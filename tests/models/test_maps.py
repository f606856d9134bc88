"""Several maps of one cut, packed into one and back."""

import pytest
import torch
from headrace.models.exceptions import BackboneError
from headrace.models.maps import MAX_CHANNELS, Pack, Packing, Unpack
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
