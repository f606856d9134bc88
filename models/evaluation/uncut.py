"""The uncut model in ONNX Runtime: the same answers as in PyTorch, two to three times sooner on a processor core."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ..backbones import Backbone
from ..export import Only, write_onnx
from ..onnx_session import open_session


class UncutInOnnx:
    """Called like `Backbone.uncut`; of classifiers alone."""

    def __init__(self, backbone: Backbone) -> None:
        """Export the model."""
        with TemporaryDirectory(prefix="headrace-") as folder:
            path = Path(folder) / "uncut.onnx"
            write_onnx(backbone, Only(backbone.uncut), "scores", path)
            self._session = open_session(path)

    def __call__(self, pixels: Tensor) -> tuple[Tensor]:
        """Pixels uint8 [B, S, S, 3] -> scores float32 [B, classes], frame by frame."""
        frames = pixels.numpy()
        scores = [self._session.run(["scores"], {"pixels": frames[i : i + 1]})[0] for i in range(len(frames))]
        return (torch.cat([torch.from_numpy(each) for each in scores]),)
