"""timm's classifiers as backbones."""

from __future__ import annotations

import math
import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.utils.model import reparameterize_model
from torch import nn

from ..backbones import Parts, Scores
from ..bundle import Preprocessing
from ..exceptions import BackboneError
from ..tasks import Classification
from .sources import Found, Source, with_weights

_FITS = {"center": "crop", "squash": "stretch", "border": "letterbox"}
_INTERPOLATIONS = {"bicubic", "bilinear", "lanczos", "nearest"}


@cache
def names() -> tuple[str, ...]:
    """Names of the architectures."""
    return tuple(timm.list_models())


def knows(name: str) -> bool:
    """Whether there is such an architecture; a tag of weights may follow it, such as `resnet50.a1_in1k`."""
    return name.partition(".")[0] in names()


def load(source: Source) -> Found:
    """The model; see `zoo.load_backbone`.

    Raises:
        BackboneError: its weights cannot be had, or it takes no square RGB picture.
    """
    name = source.name.removeprefix("timm/")

    def make(pretrained: bool) -> nn.Module:
        if pretrained:
            _look_up_hub()
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **_sized(name, source.size))
        return model

    net, weights = with_weights(source, make, "timm")
    info = _classes(net)
    parts = Parts(
        # Branches that training needs and inference can sum up (RepVGG's and its kin) are summed up.
        reparameterize_model(net.eval()),
        Scores(),
        Classification(),
        _preprocessing(source, resolve_model_data_config(net)),  # type: ignore[no-untyped-call]
        *info,
    )
    return Found(parts, "timm", state=net, weights=weights)


def _look_up_hub() -> None:
    """Fail at once where there is no network and the hub's client would retry for most of a minute.

    Raises:
        OSError: the hub's name is not known here, and there is neither a proxy nor a cache to ask.
    """
    if getproxies() or Path(constants.HF_HUB_CACHE).is_dir():
        return
    socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)


def _sized(name: str, size: int) -> dict[str, Any]:
    """What tells an architecture with position embeddings its input's size, where it is not its usual one."""
    usual: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if not size or (usual is not None and usual.input_size[-2:] == (size, size)):
        return {}
    try:
        probe: Any = timm.create_model(name, pretrained=False, img_size=size)
    except TypeError:
        return {}
    del probe
    return {"img_size": size}


def _preprocessing(source: Source, config: dict[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    if channels != 3 or (height != width and not source.size):
        raise BackboneError(f"{source.name} takes {channels}x{height}x{width}; give --size for a square RGB picture")
    size = source.size or height
    fit = _FITS.get(config["crop_mode"], "crop")
    interpolation = config["interpolation"] if config["interpolation"] in _INTERPOLATIONS else "bicubic"
    mean, std = (tuple(round(255 * float(x), 4) for x in config[key]) for key in ("mean", "std"))
    resize = max(size, math.floor(size / config["crop_pct"])) if fit == "crop" else size
    fill = (round(mean[0]), round(mean[1]), round(mean[2]))
    return Preprocessing(resize, size, mean, std, fit, interpolation, fill if fit == "letterbox" else (0, 0, 0))


def _classes(net: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels, and WordNet ids where the classes are ImageNet's."""
    count = int(getattr(net, "num_classes", 0))
    subset = infer_imagenet_subset(net)
    if subset:
        info: Any = ImageNetInfo(subset)
        return (
            tuple(info.index_to_description(i).split(",")[0] for i in range(count)),
            tuple(info.label_names()),
        )
    return tuple(f"class {i}" for i in range(count)), ()
