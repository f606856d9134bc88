"""What `lighten` teaches from: views, teachers, and how far a head's latents are from those of the head as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..backbones import Backbone
from ..bottleneck import Encoder
from ..bundle import Bundle, SplitSpec
from ..bundle_specs import split_identity
from ..exceptions import DataError
from ..export import Only, write_graph
from ..measure import random_crop
from ..onnx_session import open_session
from .light import Light, LightCut, LightEncoder
from .team import ALONE, Team

MEASURED = 64
"""Views from which it is taken what a latent varies by, and which clips matter."""
PART = 4
"""Views of a step that are computed together: with more of them the first layers' maps leave a core's cache."""


@dataclass(frozen=True, slots=True)
class Lightening:
    """How it is learned.

    Attributes:
        steps, batch: views are drawn anew for each step.
        rate: learning rate at its height.
        average: what a running average of the weights keeps of itself a step.
        seed: of the views.
        hidden: hidden channels of each bottleneck, where a head is to have fewer, in the order of execution.
        restore: whether the server's half learns along, see `restore`.
    """

    steps: int
    batch: int = 16
    rate: float = 1e-3
    average: float = 0.998
    seed: int = 0
    hidden: tuple[int, ...] = ()
    restore: bool = False


class Views:
    """Random crops, drawn from the seed and a step's number alone.

    Attributes:
        mine: which of a step's are this process's.
    """

    def __init__(self, backbone: Backbone, paths: Sequence[Path], how: Lightening, team: Team = ALONE) -> None:
        """Raises:
        DataError: there are no photographs, or a step's views cannot be shared out evenly.
        """
        if not paths:
            raise DataError("there are no photographs to learn from; give a folder of some")
        if how.batch % team.size:
            raise DataError(f"{how.batch} views a step are not the same number for each of {team.size} processes")
        self._preprocessing, self._paths, self._how = backbone.preprocessing, paths, how
        self.mine = slice(team.rank, None, team.size)

    def at(self, step: int) -> Tensor:
        """uint8 [B, S, S, 3], a process's share of a step; those of step -1, -2, ... are all of them, and not learned
        from.

        Raises:
            DataError: a photograph cannot be read.
        """
        rng = np.random.default_rng((self._how.seed, step + 2**32))
        chosen = rng.integers(len(self._paths), size=self._how.batch)
        seeds = rng.integers(2**31, size=self._how.batch)
        mine = self.mine if step >= 0 else slice(None)
        views = [
            random_crop(self._paths[i], self._preprocessing, int(s), step + 2**32)
            for i, s in zip(chosen[mine], seeds[mine], strict=True)
        ]
        return torch.from_numpy(np.stack(views))

    def apart(self) -> list[Tensor]:
        """`MEASURED` or a few more views that are not learned from, in batches."""
        return [self.at(-1 - i) for i in range(-(-MEASURED // self._how.batch))]


def teacher_of(backbone: Backbone, bundle: Bundle, split: str, batch: int, work: Path) -> Callable[[Tensor], Tensor]:
    """Head and encoder of a split point in ONNX Runtime, which takes a third of PyTorch's time on a core.

    Of a head that is light already the whole one, which the backbone still has.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, size = work / f"teacher-{split}.onnx", backbone.at(split)[0].preprocessing.size
    module = Only(replace(backbone, own_heads={}).head(split), Encoder.of(bundle, split))
    write_graph(module, torch.zeros(batch, size, size, 3, dtype=torch.uint8), "pixels", "latent", path)
    session = open_session(path)

    def run(pixels: Tensor) -> Tensor:
        given = pixels.numpy()
        parts = [session.run(None, {"pixels": given[at : at + batch]})[0] for at in range(0, len(given), batch)]
        return torch.from_numpy(np.concatenate(parts))

    return run


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned together.

    Attributes:
        specs: its split points: all widths of an encoder, or one head.
        make: (backbone, bundle, specs, clips, pixels, hidden) -> its networks, see there.
    """

    specs: tuple[SplitSpec, ...]
    make: Callable[..., Light]


def lessons_of(bundle: Bundle, names: Sequence[str]) -> list[Lesson]:
    """What to learn for split points; one width of an encoder stands for all.

    Raises:
        DataError: one is not there, or is a learned encoder that is light already: what it was before is not kept.
    """
    there = {s.name: s for s in bundle.splits}
    found: dict[str, Lesson] = {}
    for name in names:
        spec = there.get(name)
        if spec is None:
            raise DataError(f"bundle {bundle.name} has no split point {name!r}; it has {', '.join(there)}")
        if spec.learned is None:
            found[name] = Lesson((spec,), LightCut)
        elif spec.clips is not None:
            raise DataError(f"{name} of bundle {bundle.name} is light already; begin with the bundle from before")
        else:
            alike = tuple(s for s in bundle.splits if s.learned is not None and s.learned.name == spec.learned.name)
            found[spec.learned.name] = Lesson(alike, LightEncoder)
    return list(found.values())


class Course:
    """A lesson with its views, and with what its latents are and vary by before anything is changed.

    Attributes:
        apart: views that are not learned from, in batches.
        varied: split point -> mean squared distance of its latents from their mean.
    """

    def __init__(
        self,
        backbone: Backbone,
        bundle: Bundle,
        lesson: Lesson,
        paths: Sequence[Path],
        how: Lightening,
        work: Path,
        team: Team,
    ) -> None:
        self.lesson, self.how, self.team, self.backbone, self.bundle = lesson, how, team, backbone, bundle
        batch, graphs = how.batch // team.size, work / f"graphs-{team.rank}"
        self.called = ", ".join(s.name for s in lesson.specs)
        self.views = Views(backbone.at(lesson.specs[0].name)[0], paths, how, team)
        self.apart = self.views.apart()
        self._teachers = {s.name: teacher_of(backbone, bundle, s.name, batch, graphs) for s in lesson.specs}
        self.varied = {name: self._variance(teacher) for name, teacher in self._teachers.items()}
        names = [p.name for p in paths]
        self.identity = [backbone.spec.sha256, [split_identity(s) for s in lesson.specs], repr(how), names]
        self.prepare()

    def prepare(self) -> None:
        """What a lesson of another kind needs besides."""

    def networks(self, clips: Collection[int] | None, hidden: Sequence[int] = ()) -> Light:
        """As the bundle has them, but for clips and hidden channels."""
        seen = torch.cat(self.apart)
        return self.lesson.make(self.backbone, self.bundle, self.lesson.specs, clips, seen, hidden)

    def step(self, networks: Light, step: int) -> Iterator[Tensor]:
        """The sum of a step's errors, part by part."""
        pixels = self.views.at(step)
        wanted = self.wanted(pixels)
        for at in range(0, len(pixels), PART):
            part = slice(at, at + PART)
            errors = self._errors(networks, pixels[part], {name: latents[part] for name, latents in wanted.items()})
            yield errors.sum() * (len(pixels[part]) / len(pixels))

    def worst(self, networks: Light) -> float:
        """The largest of them, on views that are not learned from."""
        with torch.no_grad():
            errors = [self._errors(networks, pixels, self.wanted(pixels)) for pixels in self.apart]
        return float(torch.stack(errors).mean(0).max())

    def wanted(self, pixels: Tensor) -> dict[str, Tensor]:
        """Split point -> what the head as it was gives, float32 [B, K, h, w]."""
        return {name: teacher(pixels) for name, teacher in self._teachers.items()}

    def _errors(self, networks: Light, pixels: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
        """Of each split point: the squared distance of its latents as a share of what they vary by."""
        distances = {
            name: (networks.students[name](pixels) - latents).square().sum((1, 2, 3)).mean()
            for name, latents in wanted.items()
        }
        return torch.stack([distance / self.varied[name] for name, distance in distances.items()])

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """What the bundle has that the lesson depends on."""
        places = tuple(f"{s.name}/" for s in self.lesson.specs)
        learned = tuple(f"{s.learned.name}/encoder/" for s in self.lesson.specs if s.learned is not None)
        return {
            **{k: v for k, v in self.bundle.tensors.items() if k.startswith(places)},
            **{k: v for k, v in self.bundle.learned.items() if k.startswith((*places, *learned))},
        }

    def _variance(self, teacher: Callable[[Tensor], Tensor]) -> float:
        latents = torch.cat([teacher(pixels) for pixels in self.apart])
        return float((latents - latents.mean(0)).square().sum((1, 2, 3)).mean())
