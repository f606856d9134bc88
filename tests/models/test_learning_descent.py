"""Descent along a loss, with a running average of what is learned in its place at the end."""

import pytest
import torch
from headrace.models.learning.descent import descend
from safetensors.torch import load_file
from torch import nn


def noisy(parameter: nn.Parameter, state: torch.Tensor):
    """A parabola around 1 whose gradient is mostly noise; beside it counts steps."""

    def loss(step: int) -> torch.Tensor:
        state.add_(1)
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        return ((parameter - 1) ** 2 + 4 * noise * parameter).sum()

    return loss


def learned(file, average: float, steps: int = 300) -> tuple[torch.Tensor, float]:
    parameter, state = nn.Parameter(torch.zeros(64)), torch.zeros(())
    named, counted = {"p": parameter}, {"steps": state}
    descend(named, noisy(parameter, state), 0.05, steps, file, "x", state=counted, average=average)
    return parameter.detach().clone(), float(state)


def test_the_average_takes_the_place_of_what_was_last(tmp_path):
    parameter, state = nn.Parameter(torch.zeros(64)), torch.zeros(())
    seen: list[torch.Tensor] = []
    loss = noisy(parameter, state)

    def watched(step: int) -> torch.Tensor:
        seen.append(parameter.detach().clone())
        return loss(step)

    descend({"p": parameter}, watched, 0.05, 40, tmp_path / "mean", "x", state={"s": state}, average=0.9)
    last, _ = learned(tmp_path / "last", 0.0, 40)
    mean, count = seen[0], 0.0
    for step, each in enumerate([*seen[1:], last], 1):
        keep = min(0.9, step / (step + 19))
        mean, count = keep * mean + (1 - keep) * each, keep * count + (1 - keep) * step
    torch.testing.assert_close(parameter.detach(), mean)
    assert float(state) == pytest.approx(count, rel=1e-4)  # of the state, too
    assert not any(key.startswith("mean/") for key in load_file(tmp_path / "last"))


def test_the_average_goes_on_where_a_run_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.descent.SAVE_SECONDS", 0.0)

    def killed(step: int, loss: float) -> None:
        if step == 30:
            raise InterruptedError

    parameter, state = nn.Parameter(torch.zeros(64)), torch.zeros(())
    arguments = ({"p": parameter}, noisy(parameter, state), 0.05, 60, tmp_path / "killed", "x")
    with pytest.raises(InterruptedError):
        descend(*arguments, note=killed, state={"steps": state}, average=0.95)
    again, count = learned(tmp_path / "killed", 0.95, 60)
    whole, steps = learned(tmp_path / "whole", 0.95, 60)
    torch.testing.assert_close(again, whole)
    assert count == pytest.approx(steps)
    # One that has ended is taken up as it ended.
    torch.testing.assert_close(learned(tmp_path / "killed", 0.95, 60)[0], whole)
