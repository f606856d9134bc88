"""Layers of an encoder that nothing is between run as one."""

import pytest
import torch
from headrace.models.learning.slimmable import PlainEncoder
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(
    ("channels", "fewer"), [((2, 8, 8, 16, 8, 16, 16, 12), 2), ((4, 16, 4, 16, 8, 16, 8, 12), 1), ((8, 4, 8, 8, 1), 0)]
)
def test_layers_that_nothing_is_between_are_merged(channels, fewer):
    """The second one's 1x1s would cost more as one; Darknet's layers have an activation each."""
    torch.manual_seed(5)
    plain = PlainEncoder(channels, 6)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    merged = plain.merged()
    assert len(merged.layers) == len(merged.plan) == len(plain.layers) - fewer
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(merged(pixels), plain(pixels), atol=1e-4, rtol=1e-4)
    assert _multiply_accumulates(merged, pixels) <= _multiply_accumulates(plain, pixels)


def _multiply_accumulates(network: torch.nn.Module, pixels: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(pixels)
    return int(counter.get_total_flops()) // 2
