"""Models such as a user would bring, small enough to be traced in a moment. Built by `models.zoo.own_module`."""

import torch
from torch import nn


class Residual(nn.Module):
    """In-place activations, a skip connection, functional operations between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.first = nn.Conv2d(16, 16, 3, 1, 1)
        self.second = nn.Conv2d(16, 16, 3, 1, 1)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.scores = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.first(x).relu_()
        x += self.second(y)
        return self.scores(torch.relu(self.down(x)).mean((2, 3)))


class Writing(nn.Module):
    """Writes into parts of tensors that are read under other names afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.scores = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x[:, :4] += 1
        x.view(len(x), 8, -1).relu_()
        y = self.second(x)
        part = y[:, 2:]
        part.mul_(2)
        return self.scores(y.mean((2, 3)))


class Windows(nn.Module):
    """Channels last, as windowed attention has them, with a size that hangs on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU()) for _ in range(2))
        self.scores = nn.Linear(12, 5)
        self.register_buffer("places", torch.arange(16).view(4, 4))
        self.bias = nn.Parameter(torch.randn(16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            b, h, w, c = x.shape
            y = x.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 4, 4, c)
            y = block(y + self.bias[self.places])
            x = x + y.view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
        return self.scores(x.mean((1, 2)))


class Pyramid(nn.Module):
    """A U-Net: two tensors or more are needed at every place but the first and the last ones."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(depth))
        self.up = nn.ModuleList(nn.Conv2d(16, 8, 3, 1, 1) for _ in range(depth - 1))
        self.classes = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.down:
            x = layer(x).relu()
            kept.append(x)
        x = kept.pop()
        for layer in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, kept.pop()], 1)).relu()
        return self.classes(x)


class Dense(nn.Module):
    """Every layer is read at the end: too many tensors at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 3, 2, 1) for _ in range(8))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [stem(x).relu() for stem in self.stems]
        return torch.cat([head(m.mean((2, 3))) for head, m in zip(self.heads, maps, strict=True)], 1)


class Boxes(nn.Module):
    """A detector as a user's model has to be: scores and corners."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.scores, self.corners = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(x)
        scores, corner = self.scores(x), self.corners(x)[:, :2]
        corner = corner.flatten(2).transpose(1, 2).sigmoid() * 32
        return scores.flatten(2).transpose(1, 2).sigmoid(), torch.cat((corner, corner + 16), 2)


class Both(nn.Module):
    """What the whole picture shows, and boxes, from the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = Boxes(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.boxes.body(x)
        logits = self.scores(features.mean((2, 3)))
        scores, corner = self.boxes.scores(features), self.boxes.corners(features)[:, :2]
        corner = corner.flatten(2).transpose(1, 2).sigmoid() * 32
        return logits, scores.flatten(2).transpose(1, 2).sigmoid(), torch.cat((corner, corner + 16), 2)


class Branching(nn.Module):
    """Asks for a tensor's value in Python, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scores = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.scores((y * 2 if y.sum().item() > 0 else y).mean((2, 3)))


class FixedBatch(nn.Module):
    """Only runs for one frame."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scores = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu().view(1, 8, 16, 16)).relu()
        return self.scores(y.mean((2, 3)))


def one_layer() -> nn.Module:
    """Nothing lies between head and tail."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def no_module() -> int:
    """No model."""
    return 3
