"""Exported graphs are rewritten to be faster, and give what they gave."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from headrace.models.backbones import Pixels
from headrace.models.bundle import Preprocessing
from headrace.models.export import write_graph
from torch import nn

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class _Network(nn.Module):
    def __init__(self, mean, std, first: nn.Module, middle: nn.Module | None = None, both: bool = False) -> None:
        super().__init__()
        self.pixels = Pixels(Preprocessing(32, 32, mean, std))
        self.first, self.middle, self.both = first, middle or nn.ReLU6(), both
        self.project, self.transform = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(6, 5, 1)

    def forward(self, pixels):
        features = self.project(self.middle(self.first(self.pixels(pixels))))
        latent = self.transform(features)
        return (latent, features) if self.both else latent


def _run(network: nn.Module, path, batch: int = 1, names="latent"):
    """What PyTorch and ONNX Runtime give for the same pixels, and the graph's operations."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    pixels = torch.from_numpy(np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), np.uint8))
    write_graph(network, torch.zeros_like(pixels), "pixels", names, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    with torch.inference_mode():
        wanted = network(pixels)
    found = onnxruntime.InferenceSession(path).run(None, {"pixels": pixels.numpy()})
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4, rtol=1e-4)
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("mean", "std"), [(127.0, 128.0), (0.0, 255.0), (127.0, 1.0), IMAGENET, (127.5, 127.5)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (5, 1, 2), (4, 4, 0), (7, 2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_first_convolution_reads_interleaved_bytes(mean, std, kernel, stride, padding, batch, tmp_path):
    """Also where the mean is no whole number or one a channel; zeros around the picture stay the mean."""
    first = nn.Conv2d(3, 8, kernel, stride, padding)
    found = _run(_Network(mean, std, first), tmp_path / "graph.onnx", batch)
    assert "Transpose" not in found and found.count("Reshape") == 1
    whole = isinstance(mean, float) and mean.is_integer()
    assert ("DequantizeLinear" in found) == whole and ("Cast" in found) != whole


@pytest.mark.parametrize("first", [nn.Conv2d(3, 8, 3, dilation=2), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3))])
def test_what_does_not_begin_with_a_plain_convolution_stays(first, tmp_path):
    assert "Transpose" in _run(_Network(127.0, 128.0, first), tmp_path / "graph.onnx")


@pytest.mark.parametrize(("middle", "left"), [(nn.ReLU6(), 2), (nn.Identity(), 1)])
def test_convolutions_that_nothing_is_between_become_one(middle, left, tmp_path):
    first = nn.Conv2d(3, 8, 3)
    assert _run(_Network(127.0, 128.0, first, middle), tmp_path / "graph.onnx").count("Conv") == left


def test_what_somebody_asks_for_is_not_merged_away(tmp_path):
    network = _Network(127.0, 128.0, nn.Conv2d(3, 8, 3), both=True)
    assert _run(network, tmp_path / "graph.onnx", names=("latent", "features")).count("Conv") == 3


def test_what_would_cost_more_as_one_is_not_merged(tmp_path):
    network = _Network(127.0, 128.0, nn.Conv2d(3, 8, 3))
    network.project, network.transform = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 9, 1)
    assert _run(network, tmp_path / "graph.onnx").count("Conv") == 3
