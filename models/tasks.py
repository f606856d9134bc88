"""Tasks: what a backbone's outputs mean, when two answers agree, and what of them the Fisher metric asks for.

outputs of the tail (tensors) --answers--> one answer a frame --agreement--> 0..1 beside the uncut model's
                              --probe--> a scalar whose gradient at the cut says what matters there
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from .class_map import MAX_CLASSES
from .exceptions import BackboneError

CLASSIFICATION, DETECTION, SEGMENTATION = "classification", "detection", "segmentation"
BOTH = "+"
"""Joins the names of the tasks of a model that has several."""
BEST = 5
"""Labels in an answer."""
PIXELS = 64
"""Pixels of a segmentation whose classes are drawn for the Fisher metric."""
MATCH_IOU = 0.5
"""Overlap from which two boxes of one class are the same."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The best classes and their scores 0..1, best first."""

    indexes: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes, best first: class indexes int [N], scores [N] 0..1, corners [N, 4] (left, top, right, bottom) in pixels of
    the backbone's input."""

    indexes: tuple[int, ...]
    scores: tuple[float, ...]
    corners: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class ClassMap:
    """A class for every pixel, uint8 [H, W]."""

    classes: npt.NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What several tails say of one frame, in the order of their tasks."""

    parts: tuple[Labels | Boxes | ClassMap, ...]


Answer: TypeAlias = Labels | Boxes | ClassMap | Answers


class Task(ABC):
    """What outputs mean. `outputs` is the tuple of tensors that a tail gives, the batch first in each."""

    name: str
    takes = 1
    """How many of a model's outputs are this task's, where it has several."""

    @abstractmethod
    def answers(self, outputs: Sequence[Tensor]) -> list[Answer]:
        """One answer a frame."""

    @abstractmethod
    def agreement(self, answer: Answer, uncut: Answer) -> float:
        """How far an answer is the uncut model's, 0..1."""

    @abstractmethod
    def probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """A random scalar, summed over the batch, whose gradients' mean outer product is the Fisher metric.

        The log-probability of an answer drawn from the model's own would be one.
        """


class Classification(Task):
    """Outputs: scores float32 [B, classes] that sum to 1."""

    name = CLASSIFICATION

    def answers(self, outputs: Sequence[Tensor]) -> list[Answer]:
        """The five best classes."""
        scores = outputs[0]
        values, indexes = scores.topk(min(BEST, scores.shape[1]), dim=1)
        return [Labels(tuple(i), tuple(v)) for i, v in zip(indexes.tolist(), values.tolist(), strict=True)]

    def agreement(self, answer: Answer, uncut: Answer) -> float:
        """1 where the best class is the same."""
        assert isinstance(answer, Labels) and isinstance(uncut, Labels)
        return float(answer.indexes[0] == uncut.indexes[0])

    def probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """sum_c s_c sqrt(p_c) log p_c with random signs s and the first p held fixed.

        The mean outer product of its gradients is sum_c p_c g_c g_c^T, as that of one class drawn from p is, with less
        noise, because every class takes part in every draw (Hutchinson's trick).
        """
        scores = outputs[0].clamp_min(1e-12)
        signs = torch.randint(0, 2, scores.shape, generator=generator).to(scores) * 2 - 1
        return (signs * scores.detach().sqrt() * scores.log()).sum()


@dataclass(frozen=True)
class Detection(Task):
    """Outputs: scores float32 [B, A, K] of A candidates for K classes, 0..1; corners float32 [B, A, 4] in pixels of the
    input, or [B, A, K, 4] where each class has its own; and any others that only the metric looks at.

    Attributes:
        size: side of the input in pixels, to which boxes are clipped.
        minimum: scores below it are no boxes.
        overlap: of two boxes of one class that overlap by more, the better one stays (non-maximum suppression).
        most: boxes in an answer.
        confident: score from which a box counts when answers are compared.
        candidates: of so many best scores boxes are made.
    """

    size: int
    minimum: float = 0.05
    overlap: float = 0.5
    most: int = 100
    confident: float = 0.3
    candidates: int = 1000
    name: str = DETECTION
    takes = 2

    def answers(self, outputs: Sequence[Tensor]) -> list[Answer]:
        """Boxes after non-maximum suppression."""
        return [self._answer(scores, corners) for scores, corners in zip(outputs[0], outputs[1], strict=True)]

    def _answer(self, scores: Tensor, corners: Tensor) -> Boxes:
        flat = scores.flatten()
        best, places = flat.topk(min(self.candidates, len(flat)))
        places = places[best > self.minimum]
        best = best[best > self.minimum]
        classes = places % scores.shape[1]
        boxes = corners.flatten(0, -2)[places if corners.ndim == 3 else places // scores.shape[1]]
        boxes = boxes.clamp(0, self.size)
        kept = batched_nms(boxes, best, classes, self.overlap)[: self.most]
        found = zip(classes[kept].tolist(), best[kept].tolist(), boxes[kept].tolist(), strict=True)
        rows = [(int(c), float(s), (b[0], b[1], b[2], b[3])) for c, s, b in found]
        return Boxes(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))

    def agreement(self, answer: Answer, uncut: Answer) -> float:
        """F1 of the confident boxes against the uncut model's: same class, overlap of at least `MATCH_IOU`."""
        assert isinstance(answer, Boxes) and isinstance(uncut, Boxes)
        hits, mine, theirs = self.matches(answer, uncut)
        return 2 * hits / (mine + theirs) if mine + theirs else 1.0

    def matches(self, answer: Boxes, uncut: Boxes) -> tuple[int, int, int]:
        """Confident boxes that both have, those of the answer, and those of the uncut model."""
        mine, theirs = (self._confident(each) for each in (answer, uncut))
        if not len(mine[0]) or not len(theirs[0]):
            return 0, len(mine[0]), len(theirs[0])
        overlap = box_iou(mine[1], theirs[1]) * (mine[0][:, None] == theirs[0][None])
        hits, free = 0, torch.ones(len(theirs[0]), dtype=torch.bool)
        for row in overlap:
            best = int((row * free).argmax())
            if row[best] >= MATCH_IOU and free[best]:
                free[best] = False
                hits += 1
        return hits, len(mine[0]), len(theirs[0])

    def _confident(self, boxes: Boxes) -> tuple[Tensor, Tensor]:
        kept = [i for i, s in enumerate(boxes.scores) if s >= self.confident]
        corners = torch.tensor([boxes.corners[i] for i in kept]).reshape(-1, 4)
        return torch.tensor([boxes.indexes[i] for i in kept]), corners

    def probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """A random projection of scores, of corners weighted by the root of their scores, and of all other outputs."""
        scores, corners, *others = outputs
        weight = scores.detach().sqrt()
        weight = weight[..., None] if corners.ndim == 4 else weight.amax(2, keepdim=True)
        # Corners in units of an eighth of the input weigh as much as scores.
        parts = [scores, corners * weight * (8 / self.size), *others]
        total = scores.new_zeros(())
        for part in parts:
            total = total + (part * torch.randn(part.shape, generator=generator).to(part.device)).sum()
        return total


class Segmentation(Task):
    """Outputs: logits float32 [B, classes, H, W] of at most 256 classes."""

    name = SEGMENTATION

    def answers(self, outputs: Sequence[Tensor]) -> list[Answer]:
        """The likeliest class of every pixel."""
        if outputs[0].shape[1] > MAX_CLASSES:
            raise BackboneError(f"a class map tells {MAX_CLASSES} classes apart, this model has {outputs[0].shape[1]}")
        return [ClassMap(each) for each in outputs[0].argmax(1).to(torch.uint8).cpu().numpy()]

    def agreement(self, answer: Answer, uncut: Answer) -> float:
        """Share of pixels with the same class."""
        assert isinstance(answer, ClassMap) and isinstance(uncut, ClassMap)
        return float((answer.classes == uncut.classes).mean())

    def probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Of classes drawn at random pixels of each frame."""
        logits = outputs[0].flatten(2)
        places = torch.randint(logits.shape[2], (PIXELS,), generator=generator).to(logits.device)
        chosen = logits[:, :, places].log_softmax(1).transpose(1, 2).flatten(0, 1)
        drawn = torch.multinomial(chosen.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        return chosen.gather(1, drawn).sum()


class Several(Task):
    """Several tails behind one cut, all of which answer every packet. Outputs: those of the first task, those of the
    second, and so on, as many as each one `takes`."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Called `classification+detection`, in the order of its tasks.

        Raises:
            BackboneError: one comes twice.
        """
        self.tasks = tuple(tasks)
        self.name = BOTH.join(task.name for task in tasks)
        self.takes = sum(task.takes for task in tasks)
        if len({task.name for task in tasks}) < len(tasks):
            raise BackboneError(f"{self.name} names a task twice; a tail is known by its task")

    def apart(self, outputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Each task's own outputs."""
        ends = list(accumulate(task.takes for task in self.tasks))
        return [outputs[end - task.takes : end] for task, end in zip(self.tasks, ends, strict=True)]

    def answers(self, outputs: Sequence[Tensor]) -> list[Answer]:
        """One answer a task, together."""
        each = [task.answers(own) for task, own in zip(self.tasks, self.apart(outputs), strict=True)]
        return [Answers(parts) for parts in zip(*each, strict=True)]

    def agreement(self, answer: Answer, uncut: Answer) -> float:
        """Mean over the tasks."""
        assert isinstance(answer, Answers) and isinstance(uncut, Answers)
        pairs = zip(self.tasks, answer.parts, uncut.parts, strict=True)
        return sum(task.agreement(a, u) for task, a, u in pairs) / len(self.tasks)

    def probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """The sum of theirs, each drawn by itself: disturbances of all answers count."""
        parts = zip(self.tasks, self.apart(outputs), strict=True)
        return torch.stack([task.probe(own, generator) for task, own in parts]).sum()
