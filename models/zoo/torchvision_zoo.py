"""torchvision's classifiers, detectors and segmentation models as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torchvision.models as zoo
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from ..backbones import AsTheyAre, Parts, Scores
from ..bundle import Preprocessing
from ..exceptions import BackboneError
from ..tasks import Classification, Detection, Segmentation
from .detectors import KINDS, Body, rest_of
from .sources import Found, Source, with_weights


@cache
def names() -> tuple[str, ...]:
    """Names of all models of the three kinds."""
    return (*_classifiers(), *_detectors(), *_segmenters())


def knows(name: str) -> bool:
    """Whether there is such a model."""
    return name in names()


def load(source: Source) -> Found:
    """The model; see `zoo.load_backbone`.

    Raises:
        BackboneError: its weights cannot be had, or its answers have no place on the stream.
    """
    name = source.name.removeprefix("torchvision/")
    published: Any = next(iter(zoo.get_model_weights(name)), None)
    default: Any = zoo.get_model_weights(name).DEFAULT if published is not None else None

    def make(pretrained: bool) -> nn.Module:
        options: dict[str, Any] = {"weights": default if pretrained else None}
        if name in (*_detectors(), *_segmenters()):
            options["weights_backbone"] = None
        elif name in ("googlenet", "inception_v3") and not pretrained:
            options |= {"aux_logits": False, "init_weights": True}
        return zoo.get_model(name, **options)  # type: ignore[no-any-return]

    net, weights = with_weights(source, make, "torchvision", pretrained=default is not None)
    labels = tuple(default.meta["categories"]) if default is not None else ()
    if name in _detectors():
        parts = _detector(net, labels, source)
    elif name in _segmenters():
        how = _from_transforms(default.transforms(), source.size, "letterbox")
        parts = Parts(_MainOutput(net), AsTheyAre(), Segmentation(), how, labels)
    else:
        info: Any = ImageNetInfo()
        how = _from_transforms(default.transforms(), source.size, "crop")
        parts = Parts(net, Scores(), Classification(), how, labels, tuple(info.label_names()))
    return Found(parts, "torchvision", state=_Kept(net), weights=weights)


class _Kept(nn.Module):
    """Keeps a model's state by its own names after its parts were taken out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._state = dict(net.state_dict())

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self._state


class _MainOutput(nn.Module):
    """A segmentation model without its auxiliary classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.net(pixels)["out"]
        return logits


@cache
def _classifiers() -> tuple[str, ...]:
    return tuple(n for n in zoo.list_models(module=zoo) if not n.startswith("raft"))


@cache
def _detectors() -> tuple[str, ...]:
    return tuple(zoo.list_models(module=zoo.detection))


@cache
def _segmenters() -> tuple[str, ...]:
    return tuple(zoo.list_models(module=zoo.segmentation))


def _detector(net: Any, labels: tuple[str, ...], source: Source) -> Parts:
    transform = net.transform
    fixed = getattr(transform, "fixed_size", None)
    size = source.size or (fixed[0] if fixed else int(transform.min_size[-1]))
    fit = "stretch" if fixed else "letterbox"
    mean, std = (
        tuple(round(255 * float(x), 4) for x in values) for values in (transform.image_mean, transform.image_std)
    )
    fill = (round(mean[0]), round(mean[1]), round(mean[2])) if fit == "letterbox" else (0, 0, 0)
    how = Preprocessing(size, size, mean, std, fit, "bilinear", fill)
    body = Body(net)
    kind = type(net).__name__
    rules = net.roi_heads if kind == "FasterRCNN" else net
    if kind not in KINDS:
        raise BackboneError(
            f"{source.name} answers with more than boxes, which the stream does not carry; take one of "
            f"{', '.join(n for n in _detectors() if 'mask' not in n and 'keypoint' not in n)}"
        )
    most = getattr(rules, "detections_per_img", 100)
    task = Detection(size, max(float(rules.score_thresh), 0.01), float(rules.nms_thresh), min(int(most), 100))
    # Candidates' classes begin behind the background, except where each class is judged by itself.
    own = labels if kind in ("RetinaNet", "FCOS") else labels[1:]
    return Parts(body, rest_of(net, size), task, how, own)


def _of_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(255 * float(x), 4) for x in values)


def _from_transforms(transforms: Any, size: int, fit: str) -> Preprocessing:
    resize = int(transforms.resize_size[0])
    crop = int(transforms.crop_size[0]) if hasattr(transforms, "crop_size") else resize
    if size:
        resize, crop = round(resize * size / crop), size
    mean, std = _of_255(transforms.mean), _of_255(transforms.std)
    interpolation = str(transforms.interpolation.value)
    if fit == "crop":
        return Preprocessing(max(resize, crop), crop, mean, std, fit, interpolation)
    fill = (round(mean[0]), round(mean[1]), round(mean[2]))
    return Preprocessing(crop, crop, mean, std, fit, interpolation, fill)
