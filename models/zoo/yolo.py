"""YOLOv2-tiny as a backbone: layers and weights from `darknet`, boxes from its regions."""

from __future__ import annotations

from torch import nn

from ..backbones import Parts
from ..bundle import Preprocessing
from ..exceptions import BackboneError
from ..tasks import Detection
from .darknet import CLASSES, PACKAGE, SIZE, Regions, find_weights, load_weights, yolov2_tiny
from .sources import Found, Source, with_weights

SPLITS = ("pool3", "pool4", "pool5")


def load(source: Source) -> Found:
    """The model; see `zoo.load_backbone`.

    Raises:
        BackboneError: the package is missing or its weights are not the published ones.
    """
    size, digest = source.size or SIZE, ""
    if size % 32:
        raise BackboneError(f"yolov2_tiny takes multiples of 32 pixels, not {size}")
    names = tuple(f"class {i}" for i in range(CLASSES))

    def make(pretrained: bool) -> nn.Module:
        net = yolov2_tiny()
        if pretrained:
            nonlocal digest, names
            path, names_file = find_weights()
            digest = load_weights(net, path)
            names = tuple(line.strip() for line in names_file.read_text().splitlines() if line.strip())
        return net

    if source.seed is None and source.weights is None:
        net, weights = make(True), ""
    else:
        net, weights = with_weights(source, make, PACKAGE)
    how = Preprocessing(size, size, 0.0, 255.0, "letterbox", "bilinear", (127, 127, 127))
    task = Detection(size, minimum=0.05, overlap=0.45)
    parts = Parts(net, Regions(size), task, how, names, splits=SPLITS, any_size=True)
    return Found(parts, PACKAGE, state=net, sha256=digest, weights=weights)
