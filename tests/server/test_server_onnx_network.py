"""Tails in ONNX Runtime: they answer as PyTorch does, and what they cannot answer so stays with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from headrace.models.backbones import Backbone
from headrace.models.bundle import Bundle
from headrace.models.zoo.catalogue import backbone_of
from headrace.protos.messages import TailOutput
from headrace.server import tail
from headrace.server.config import SHIPPED_BUNDLE, ServerSettings
from headrace.server.daemon import engine_of
from headrace.server.engine import FeatureInput, ImageInput, TailInput, TailKey
from headrace.server.exceptions import SettingsError
from headrace.server.onnx_network import OnnxNetwork, as_it_is, onnx_runtime
from headrace.server.tail import FeatureTail, UncutTail
from torch import Tensor, nn

DETECTOR = SHIPPED_BUNDLE.with_name("yolov2_tiny")


def frames_of(bundle: Bundle, key: TailKey, count: int) -> list[TailInput]:
    """Random symbols at random rate levels, or random pixels."""
    random = np.random.default_rng(count)
    if not key.split:
        size = bundle.preprocessing.size
        return [ImageInput(random.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]
    shape, levels = bundle.split(key.split).latent_shape, bundle.split(key.split).rate_levels
    gains = [bundle.gain(key.split, int(level)) for level in random.integers(0, levels, count)]
    return [FeatureInput(random.integers(-3, 4, shape).astype(np.int32), gain) for gain in gains]


def same(one: tuple[TailOutput, ...], other: tuple[TailOutput, ...]) -> bool:
    """Equal but for the last digits."""
    for a, b in zip(one, other, strict=True):
        if [x.index for x in a.labels] != [x.index for x in b.labels] or len(a.boxes) != len(b.boxes):
            return False
        if not np.allclose([x.score for x in a.labels], [x.score for x in b.labels], atol=1e-4):
            return False
        boxes, others = ([astuple(box) for box in each.boxes] for each in (a, b))
        if boxes and not np.allclose(boxes, others, rtol=1e-4, atol=1e-2):
            return False
    return True


def pair(bundle: Bundle, backbone: Backbone, split: str) -> tuple[FeatureTail | UncutTail, FeatureTail | UncutTail]:
    """A tail in ONNX Runtime and in PyTorch."""
    cpu, lowers = torch.device("cpu"), (onnx_runtime(1), as_it_is)
    if split:
        ours, theirs = (FeatureTail(bundle, split, backbone, cpu, lower) for lower in lowers)
        return ours, theirs
    size = bundle.preprocessing.size
    one, other = (UncutTail(size, backbone.uncut, backbone.task, cpu, lower) for lower in lowers)
    return one, other


def test_every_shipped_tail_runs_in_onnx_runtime_and_answers_as_in_pytorch(bundle: Bundle) -> None:
    backbone = backbone_of(bundle)
    for split in (*(spec.name for spec in bundle.splits), ""):
        ours, theirs = pair(bundle, backbone, split)
        assert isinstance(ours._network, OnnxNetwork), split
        # It was traced with two, and proved with one and three.
        for count in (1, 5):
            inputs = frames_of(bundle, TailKey(bundle.fingerprint, split), count)
            answers = ours(inputs)
            assert len(answers) == count
            for mine, other in zip(answers, theirs(inputs), strict=True):
                assert same(mine, other), split


def test_a_detector_finds_the_same_boxes() -> None:
    bundle = Bundle.load(DETECTOR)
    split = bundle.splits[-1].name
    ours, theirs = pair(bundle, backbone_of(bundle), split)
    assert isinstance(ours._network, OnnxNetwork)
    inputs = frames_of(bundle, TailKey(bundle.fingerprint, split), 4)
    found = ours(inputs)
    assert any(each[0].boxes for each in found)
    assert all(same(a, b) for a, b in zip(found, theirs(inputs), strict=True))


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
async def test_the_setting_says_what_runs_the_tails(runtime: str, bundle: Bundle, monkeypatch: Any) -> None:
    monkeypatch.setenv("HEADRACE_SERVER_RUNTIME", runtime)
    asked = []

    def tails(_: Bundle, *how: Any) -> dict[TailKey, Any]:
        asked.append(how)
        return {}

    monkeypatch.setattr(tail, "tails_of", tails)
    engine = engine_of(ServerSettings.load(threads=3))
    await engine.load(bundle)
    await engine.close()
    assert asked == [("cpu", runtime, 3)]
    with pytest.raises(SettingsError, match="--runtime"):
        ServerSettings.load(runtime="tensorrt")


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return values * 2, values.sum(1)


class OfOneSize(nn.Module):
    """The trace has the size of the batch that it was made with."""

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values + torch.zeros(len(values.tolist()), 1),)


class Branching(nn.Module):
    """The trace has the way that the first batch took."""

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values * 2 if float(values.sum()) > 10 else values,)


class OutOfReach(nn.Module):
    """There is no such operation in ONNX."""

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return (torch.special.bessel_j0(values),)


def batch(size: int) -> tuple[Tensor, ...]:
    """Sums above 10 for more than one frame only."""
    return (torch.full((size, 3), 3.0),)


def test_a_graph_takes_batches_of_any_size_and_gives_all_outputs() -> None:
    network = onnx_runtime(1)("doubled", Doubled().eval(), batch)
    assert isinstance(network, OnnxNetwork)
    for size in (1, 2, 7):
        twice, total = network(*batch(size))
        assert torch.equal(twice, torch.full((size, 3), 6.0)) and torch.equal(total, torch.full((size,), 9.0))


@pytest.mark.parametrize("make", [OfOneSize, Branching, OutOfReach])
def test_what_would_answer_differently_stays_with_pytorch_and_the_log_says_so(make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    with structlog.testing.capture_logs() as logs:
        assert onnx_runtime(1)("odd", module, batch) is module
    assert [(each["event"], each["tail"]) for each in logs] == [("a tail stays with PyTorch", "odd")]
    assert logs[0]["why"]
    assert as_it_is("odd", module, batch) is module
