"""A detector that finds red and blue squares without having learned anything, and pictures of such squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZE = 64
SIDE = 16


class Squares(nn.Module):
    """Redness and blueness of a place against a threshold are its scores; every place proposes a square around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.scores = nn.Conv2d(8, 2, 3, padding=1)
        with torch.no_grad():
            weight = torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.3
            weight[:2, :, 0, 0] = torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])
            self.stem.weight.copy_(weight.expand(-1, -1, 4, 4) / 16)
            self.stem.bias.zero_()
            # The mean of nine places, in which there is much red or blue: from -4 without any to 10.
            self.scores.weight.zero_()
            self.scores.bias.fill_(-3)
            for i in range(2):
                self.scores.weight[i, i] = 4 / 9
        centres = (torch.arange(SIZE // 4) + 0.5) * 4
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        half = SIDE / 3  # letterboxed from 96 to 64 pixels
        corners = torch.stack((x - half, y - half, x + half, y + half), -1).reshape(1, -1, 4)
        self.register_buffer("corners", corners)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.stem(x)
        scores = self.scores(features).sigmoid().flatten(2).transpose(1, 2)
        return scores, self.corners.expand(len(x), -1, -1) + 0 * scores[..., :1]


def make_scenes(folder: Path, count: int) -> Path:
    """Pictures of 96x64 pixels in images/, YOLO's labels in labels/, the names of the classes in classes.txt.

    A third shows a red square, a third a blue one, a third nothing; on grey noise.
    """
    rng = np.random.default_rng(3)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "classes.txt").write_text("red\nblue\n")
    for i in range(count):
        pixels = rng.normal(110, 6, (64, 96, 1)).repeat(3, 2)
        kind, lines = int(rng.integers(3)), ""
        if kind < 2:
            left, top = rng.integers(0, 96 - SIDE), rng.integers(0, 64 - SIDE)
            pixels[top : top + SIDE, left : left + SIDE] = ((230, 30, 30), (30, 30, 230))[kind]
            centre = (left + SIDE / 2) / 96, (top + SIDE / 2) / 64
            lines = f"{kind} {centre[0]:.6f} {centre[1]:.6f} {SIDE / 96:.6f} {SIDE / 64:.6f}\n"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i:03}.png")
        (folder / "labels" / f"{i:03}.txt").write_text(lines)
    return folder
