"""Descent along a loss, with checkpoints from which a run that was killed goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .memory import keep_memory

CLIP = 5.0
"""Most that a step's gradient may have as its norm."""
SAVE_SECONDS = 30.0
WARM_UP = 30
"""Steps over which the learning rate rises; after them it falls along a cosine."""


def descend(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int], Tensor | Iterable[Tensor]],
    rate: float,
    steps: int,
    checkpoint: Path,
    identity: str,
    note: Callable[[int, float], None] = lambda *_: None,
    state: Mapping[str, Tensor] | None = None,
    exchange: Callable[[], None] = lambda: None,
    keeps: bool = True,
    rates: Callable[[str], float] = lambda _: 1.0,
    average: float = 0.0,
) -> None:
    """Descend along a loss, from the checkpoint on where there is one of the same identity.

    Args:
        parameters: changed in place, by name.
        loss_of: number of the step -> scalar, or scalars whose sum it is; each is done with before the next one is
            asked for. All that is random in it must be drawn anew from that number, so that a run that was killed and
            resumed ends as one that was not.
        rate: learning rate at its height.
        steps: in all.
        checkpoint: file to write now and then.
        identity: of what is learned, from what and how; a checkpoint of another one is not used.
        note: called with steps done and the step's loss.
        state: what else the loss changes in place and a checkpoint has to hold, such as running statistics, by name.
        exchange: called between gradients and step, where several processes learn together.
        keeps: whether this process writes checkpoints.
        rates: name of a parameter -> its learning rate as a multiple of `rate`.
        average: what a running average of parameters and floating-point state keeps of itself at a step; it takes their
            place after the last one. 0 for none.
    """
    keep_memory()
    alike: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        alike.setdefault(rates(name), []).append(parameter)
    groups = [{"params": each, "times": times} for times, each in alike.items()]
    optimiser = torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)
    mean = _Average({**parameters, **(state or {})}, average)
    done = _restore(checkpoint, identity, parameters, state or {}, optimiser, mean)
    saved = time.monotonic()
    while done < steps:
        now = rate * min(1.0, (done + 1) / WARM_UP) * (0.505 + 0.495 * math.cos(math.pi * done / steps))
        for group in optimiser.param_groups:
            group["lr"] = group["times"] * now
        optimiser.zero_grad(set_to_none=True)
        loss, parts = 0.0, loss_of(done)
        for part in (parts,) if isinstance(parts, Tensor) else parts:
            part.backward()
            loss += float(part.detach())
        exchange()
        given = [p for p in parameters.values() if p.grad is not None]
        if bool(torch.isfinite(nn.utils.clip_grad_norm_(given, CLIP))):
            optimiser.step()  # one frame that a float32 cannot hold must not end all that was learned
        done += 1
        mean.add(done)
        if done == steps:
            mean.replace()
        if keeps and (time.monotonic() - saved > SAVE_SECONDS or done == steps):
            _store(checkpoint, identity, done, parameters, state or {}, optimiser, mean)
            saved = time.monotonic()
        note(done, loss)


class _Average:
    """A running average of tensors, by name; of none where it keeps nothing."""

    def __init__(self, tensors: Mapping[str, Tensor], keep: float) -> None:
        """As a mean of what has been, at first, so that where learning began is soon forgotten."""
        self._keep = keep
        self._tensors = {k: v.detach() for k, v in tensors.items() if keep and v.is_floating_point()}
        self.mean = {k: v.clone() for k, v in self._tensors.items()}

    def add(self, step: int) -> None:
        """Take what the tensors are after a step into it."""
        if self.mean:
            keep = min(self._keep, step / (step + 19))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.mean.values()), list(self._tensors.values()), 1 - keep)

    def replace(self) -> None:
        """Put it in the tensors' place."""
        for name, value in self.mean.items():
            self._tensors[name].copy_(value)


def _store(
    file: Path,
    identity: str,
    done: int,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    mean: _Average,
) -> None:
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"state/{name}": value for name, value in state.items()}
    tensors |= {f"mean/{name}": value for name, value in mean.mean.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}/{name}": torch.as_tensor(value) for key, value in optimiser.state[p].items()}
    data = save_tensors(
        {k: v.cpu().contiguous().clone() for k, v in tensors.items()}, {"identity": identity, "done": str(done)}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(file)  # whoever is killed here leaves the file before it


def _restore(
    file: Path,
    identity: str,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    mean: _Average,
) -> int:
    """Steps done; 0 where there is no checkpoint of this identity."""
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as stored:
        said = stored.metadata()
        if said.get("identity") != identity:
            return 0
        for key in stored.keys():  # noqa: SIM118 - not a mapping
            kind, name = key.split("/", 1)
            value = stored.get_tensor(key)
            if kind == "parameter":
                with torch.no_grad():
                    parameters[name].copy_(value)
            elif kind == "state":
                state[name].copy_(value)
            elif kind == "mean":
                mean.mean[name].copy_(value)
            else:
                parameter = parameters[name]
                optimiser.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    return int(said["done"])
