"""`headrace imitate`: another encoder for a latent that is there already.

pixels -> the bundle's encoder -> latent, which is the target of -> another encoder, cheaper, with other layers

What the latent is for, the synthesis and the rest of the backbone, stays as it is and is not run: a step costs the two
encoders, a tenth of what learning from the answers costs, and every place of the latent says what is wrong. (A
distillation of features: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.) So a machine without a GPU
can fit an encoder to another processor: which layers are cheap is not the same everywhere.

Errors are counted evenly over the latent's channels, which the metric of the answers has whitened (`start.principal`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..backbones import Backbone, Pixels
from ..bundle import Bundle, LearnedSpec, SplitSpec
from ..exceptions import BundleError, DataError
from ..export import write_graph
from ..extend import added, without
from ..measure import View, random_crop
from ..onnx_time import one_core_session
from ..split import fit_splits, measured_points, timed
from .cut import learned_cuts
from .descent import descend
from .resume import taken_up
from .slimmable import PlainEncoder, SlimmableEncoder, family, fault, run
from .team import Team

MEASURED = 64
"""Views from which statistics are taken: of the first layers' values, and of what the latent varies by."""


@dataclass(frozen=True, slots=True)
class Imitation:
    """What is learned, and how.

    Attributes:
        of: split point of a learned encoder whose latent is imitated.
        width: name of the new one among its widths.
        channels: of its layers, see `slimmable`.
        steps, batch: views are drawn anew for each step.
        rate: learning rate at its height.
        average: what a running average of the weights keeps of itself a step.
        seed: of views and first weights.
    """

    of: str
    width: str
    channels: tuple[int, ...]
    steps: int
    batch: int = 16
    rate: float = 2e-3
    average: float = 0.998
    seed: int = 0

    def spec(self, bundle: Bundle) -> LearnedSpec:
        """What the bundle says of the new width.

        Raises:
            DataError: the split point is none of a learned encoder, the width's name is no plain one or there already,
                or its channels are of no form.
        """
        found = next((s.learned for s in bundle.splits if s.name == self.of), None)
        if found is None:
            there = ", ".join(s.name for s in bundle.splits if s.learned is not None) or "none"
            raise DataError(f"{self.of!r} is no learned encoder of bundle {bundle.name}; it has {there}")
        if not self.width.isalnum():
            raise DataError(f"width {self.width!r} needs a plain name")
        if wrong := fault(self.channels):
            raise DataError(f"width {self.width!r} {wrong}")
        for spec in bundle.splits:
            if spec.learned is None or spec.learned.name != found.name or spec.learned.width == self.width:
                continue
            if family(spec.learned.channels) == family(self.channels):
                raise DataError(
                    f"{spec.name} has the form of width {self.width!r} and would share its weights; give another form"
                )
        return replace(found, width=self.width, channels=self.channels)


class Imitator:
    """The two encoders, and views for both."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: PlainEncoder,
        imitation: Imitation,
        paths: Sequence[Path],
        team: Team,
        work: Path,
    ) -> None:
        """The new encoder begins with the layers that the old one has, too, from either end on; what is between them
        begins at random.

        Raises:
            DataError: there are no photographs, or one cannot be read.
        """
        if not paths:
            raise DataError("there are no photographs to learn from; give a folder of some")
        torch.manual_seed(imitation.seed)
        self._how, self._seed, self._batch = backbone.preprocessing, imitation.seed, imitation.batch
        self._paths, self._team, self._device = paths, team, team.device
        self._pixels = Pixels(backbone.preprocessing).to(team.device)
        self._teacher = _fast(teacher, self._how.size, imitation.batch, team, work)
        self._width = imitation.width
        self.encoder = SlimmableEncoder({imitation.width: imitation.channels}, teacher.plan[-1].made[0])
        self.encoder.to(memory_format=torch.channels_last)
        with torch.no_grad():
            seen = [self._pixels(self._views(-1 - i)) for i in range(-(-MEASURED // self._batch))]
            self._varied = float(torch.cat([self._teacher(x) for x in seen]).var((0, 2, 3)).mean())
        began(self.encoder, teacher.to("cpu"), torch.cat(seen).cpu())
        self.encoder.to(team.device).train()

    def loss(self, step: int) -> Tensor:
        """Mean square error of the latent in units of what it varies by, on views of this step's own."""
        pixels = self._pixels(self._views(step))
        with torch.no_grad():
            wanted = self._teacher(pixels)
        given: Tensor = self.encoder(pixels, self._width)
        return (given - wanted).square().mean() / self._varied

    def _views(self, step: int) -> Tensor:
        """uint8 [B, S, S, 3]; those of step -1, -2, ... are not learned from."""
        rng = np.random.default_rng((self._seed, step + 2**32, self._team.rank))
        chosen = rng.integers(len(self._paths), size=self._batch)
        seeds = rng.integers(2**31, size=self._batch)
        views = [
            random_crop(self._paths[i], self._how, int(s), step + 2**32) for i, s in zip(chosen, seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(views)).to(self._device)


def began(encoder: SlimmableEncoder, teacher: PlainEncoder, pixels: Tensor) -> int:
    """Give an encoder of one width the layers of another one that are alike, from the first one on and from the last
    one on, with normalisations that for these pixels change nothing; the others keep their random weights. Returns how
    many are alike."""
    (width,) = encoder.widths
    layers = encoder.layers(width)

    def alike(mine: int, theirs: int) -> bool:
        a, b = layers[mine].layer, teacher.plan[theirs]
        same = (a.kernel, a.stride, a.depthwise, a.activated) == (b.kernel, b.stride, b.depthwise, b.activated)
        return same and (a.given, a.made, a.joined) == (b.given, b.made, b.joined)

    count = min(len(layers), len(teacher.plan))
    front = next((i for i in range(count) if not alike(i, i)), count)
    back = next((i for i in range(count - front) if not alike(-1 - i, -1 - i)), count - front)
    steps: list[Callable[[Tensor], Tensor]] = []
    for at, layer in enumerate(layers):
        theirs = at if at < front else at - len(layers)
        if at < front or at >= len(layers) - back:
            plain = teacher.layers[theirs]
            assert isinstance(plain, nn.Conv2d) and plain.bias is not None
            steps.append(partial(taken_up, layer, plain.weight, torch.ones(len(plain.weight)), plain.bias, width))
        else:
            steps.append(partial(layer, width=width))
    with torch.no_grad():
        run([layer.layer for layer in layers], steps, pixels)
    return front + back


def imitate(
    backbone: Backbone,
    bundle: Bundle,
    imitation: Imitation,
    paths: Sequence[Path],
    work: Path,
    team: Team,
    progress: Progress | None = None,
) -> SlimmableEncoder:
    """Learn an encoder of one width, from where an earlier run of the same was killed.

    Args:
        backbone: the bundle's.
        bundle: it has the encoder that is imitated.
        imitation: what to learn, and how.
        paths: photographs.
        work: folder for checkpoints.
        team: the processes that learn together, and this one's device.
        progress: where to show progress; None for nowhere.

    Raises:
        DataError: see `Imitation.spec` and `Imitator`.
        BundleError: the bundle lacks the networks.
    """
    progress = progress or Progress(disable=True)
    imitation.spec(bundle)
    cut = learned_cuts(bundle)[imitation.of]
    imitator = Imitator(backbone, cut.encoder, imitation, paths, team, work)
    named, state = dict(imitator.encoder.named_parameters()), dict(imitator.encoder.named_buffers())
    what = [bundle.fingerprint.hex(), repr(imitation), [p.name for p in paths], team.size]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    bar = progress.add_task("imitation", total=imitation.steps)

    def note(done: int, loss: float) -> None:
        progress.update(bar, completed=done, description=f"imitation: {loss:.3f} of what the latent varies by")

    descend(
        named,
        imitator.loss,
        imitation.rate,
        imitation.steps,
        work / "imitation.safetensors",
        identity,
        note,
        state,
        partial(team.average_gradients, list(named.values())),
        keeps=team.first,
        average=imitation.average,
    )
    team.average(state.values())
    return imitator.encoder.requires_grad_(False).eval()


def with_imitation(
    backbone: Backbone,
    bundle: Bundle,
    imitation: Imitation,
    encoder: SlimmableEncoder,
    fit_on: Sequence[Path],
    held_out: Sequence[View],
    progress: Progress | None = None,
) -> Bundle:
    """The bundle with a split point for the new encoder, in place of one of that name; all others stay.

    Args:
        backbone: the bundle's; it knows the learned cuts afterwards.
        bundle: any.
        imitation, encoder: what was learned.
        fit_on: photographs to fit the closed form on.
        held_out: photographs, or parts of some, to measure its operating points on, as the bundle's others were.
        progress: where to show progress; None for nowhere.

    Raises:
        DataError: see `Imitation.spec`; there would be more operating points than a bundle can have.
    """
    progress = progress or Progress(disable=True)
    spec = imitation.spec(bundle)
    name = f"{spec.name}-{spec.width}"
    old = next(s for s in bundle.splits if s.name == imitation.of)
    bundle = without(bundle, {name})
    tensors = {f"{spec.name}/encoder/{key}": value.detach().half().cpu() for key, value in encoder.parts().items()}
    bundle = bundle.with_learned({**bundle.learned, **{k: v.contiguous().numpy() for k, v in tensors.items()}})
    unfitted = SplitSpec(name, old.features, old.features[0], (), learned=spec)
    backbone.learned = learned_cuts(replace(bundle, splits=(*bundle.splits, unfitted)))
    specs, arrays = fit_splits(backbone, [name], fit_on, imitation.seed, progress)
    if old.learned is None:
        raise BundleError(f"{old.name} is not learned")
    share = min(1.0, sum(spec.channels) / sum(old.learned.channels))
    bundle = added(bundle, [replace(each, learned=spec) for each in specs], arrays, {name: share})
    said = (
        f"{imitation.steps} steps of {imitation.batch} views, rate {imitation.rate:g}, average {imitation.average:g}, "
        f"seed {imitation.seed}, towards the latent of {imitation.of}"
    )
    bundle = replace(bundle, provenance={**bundle.provenance, name: said}).check()
    return measured_points(backbone, timed(backbone, bundle, progress), held_out, progress, [name]).check()


def _fast(teacher: PlainEncoder, size: int, batch: int, team: Team, work: Path) -> Callable[[Tensor], Tensor]:
    """The teacher; on a CPU in ONNX Runtime, which takes a third of the time."""
    if team.device.type != "cpu":
        return teacher.to(team.device)
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"teacher-{team.rank}.onnx"
    write_graph(teacher, torch.zeros(batch, 3, size, size), "pixels", "latent", path)
    session = one_core_session(path)

    def run(pixels: Tensor) -> Tensor:
        (found,) = session.run(None, {"pixels": pixels.contiguous().numpy()})
        return torch.from_numpy(found)

    return run
