"""torchvision's detectors, in two parts: what can be traced and cut, and what chooses boxes.

pixels [B, 3, S, S] -> body and feature pyramid (traced) -> pyramid levels -> heads, proposals, decoding (as they are)

The detectors' own resizing is left out: the input has one fixed size, which the preprocessing gives. Then anchors are
constants, and a batch is a tensor. Non-maximum suppression is the task's (`tasks.Detection`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

KINDS = ("SSD", "RetinaNet", "FCOS", "FasterRCNN")
"""Classes of detectors that answer with boxes alone."""


class Body(nn.Module):
    """float32 [B, 3, S, S] -> pyramid levels, a tuple of [B, C, H, W]."""

    def __init__(self, detector: Any) -> None:
        """Takes the detector's backbone."""
        super().__init__()
        self.body = detector.backbone

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        levels = self.body(pixels)
        return tuple(levels.values()) if isinstance(levels, dict) else (levels,)


class _Rest(nn.Module):
    """Pyramid levels -> scores [B, A, K], corners [B, A, 4] or [B, A, K, 4], and others for the metric alone."""

    def __init__(self, detector: Any, size: int) -> None:
        super().__init__()
        self.detector: Any = detector
        self.size = size
        # The traced part has the body; what is left here shares nothing with it.
        self.detector.backbone = nn.Identity()
        self._anchors: Tensor | None = None

    def anchors(self, generator: Any, levels: Sequence[Tensor]) -> Tensor:
        """float32 [A, 4] of one frame; the input's size is fixed, so that they are computed once."""
        if self._anchors is None or self._anchors.device != levels[0].device:
            # Only the shape of the image is looked at.
            image = levels[0].new_zeros(()).expand(1, 3, self.size, self.size)
            with torch.inference_mode(False):
                self._anchors = generator(ImageList(image, [(self.size, self.size)]), [x[:1] for x in levels])[0]
        return self._anchors


class SingleShotRest(_Rest):
    """SSD, SSDLite, RetinaNet and FCOS: every anchor has scores and a box."""

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        found = self.detector.head(list(levels))
        anchors, coder = self.anchors(self.detector.anchor_generator, levels), self.detector.box_coder
        deltas, logits = found["bbox_regression"], found["cls_logits"]
        if "bbox_ctrness" in found:
            scores = (logits.sigmoid() * found["bbox_ctrness"].sigmoid()).clamp_min(1e-12).sqrt()
            return scores, torch.stack([coder.decode(each, anchors) for each in deltas])
        # SSD's classes exclude each other, and the first is the background.
        scores = logits.softmax(-1)[..., 1:] if type(self.detector).__name__ == "SSD" else logits.sigmoid()
        return scores, torch.stack([coder.decode_single(each, anchors) for each in deltas])


class TwoStageRest(_Rest):
    """Faster R-CNN: proposals first, then scores and boxes for each; fewer than the most are filled up with zeros."""

    def __init__(self, detector: Any, size: int, names: tuple[str, ...]) -> None:
        """`names` of the pyramid levels, by which the pooling finds them."""
        super().__init__(detector, size)
        self.names = names

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        rpn, roi = self.detector.rpn, self.detector.roi_heads
        sizes = [(self.size, self.size)] * len(levels[0])
        by_level, deltas_by_level = rpn.head(list(levels))
        counts = [x[0].numel() for x in by_level]
        objectness, deltas = concat_box_prediction_layers(by_level, deltas_by_level)
        anchors = [self.anchors(rpn.anchor_generator, levels)] * len(sizes)
        candidates = rpn.box_coder.decode(deltas.detach(), anchors).view(len(sizes), -1, 4)
        proposals, _ = rpn.filter_proposals(candidates, objectness, sizes, counts)
        pooled = roi.box_roi_pool(OrderedDict(zip(self.names, levels, strict=True)), proposals, sizes)
        logits, refined = roi.box_predictor(roi.box_head(pooled))
        corners = roi.box_coder.decode(refined, proposals)[:, 1:]
        found, most = [len(p) for p in proposals], rpn.post_nms_top_n()
        scores = logits.softmax(-1)[:, 1:]
        # Which proposals there are has no gradient; how sure the first stage is of each place has.
        sure = objectness.sigmoid().view(len(sizes), -1)
        return _filled(scores, found, most), _filled(corners, found, most), sure


def _filled(rows: Tensor, counts: list[int], most: int) -> Tensor:
    """Rows [N, ...] of all frames -> [B, most, ...]."""
    parts = torch.split(rows, counts)
    filled = [torch.cat((p, p.new_zeros(most - len(p), *p.shape[1:]))) for p in parts]
    return torch.stack(filled)


def rest_of(detector: Any, size: int) -> nn.Module:
    """What follows the body of a detector whose class is one of `KINDS`."""
    if type(detector).__name__ == "FasterRCNN":
        return TwoStageRest(detector, size, tuple(str(n) for n in _level_names(detector, size)))
    return SingleShotRest(detector, size)


def _level_names(detector: Any, size: int) -> list[Any]:
    with torch.no_grad():
        side = max(64, size // 8)
        levels = detector.backbone(torch.zeros(1, 3, side, side))
    return list(levels) if isinstance(levels, dict) else ["0"]
