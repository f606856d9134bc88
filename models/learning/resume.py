"""Going on from the networks that a bundle holds: encoder, synthesis, and changes of the rest of the backbone.

In a bundle normalisations are folded. To learn on, each gets the statistics that its layer has on some views, and scale
and offset that undo them: in evaluation the networks give exactly what the folded ones give, and in training, where
batches have statistics of their own, as nearly as the views are like the batch. A synthesis may get more blocks than
the bundle's has; they begin by adding nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..exceptions import DataError
from ..repair.deltas import Deltas
from .cut import under
from .slimmable import SlimConv, SlimmableEncoder, family, run
from .synthesis import Synthesis, SynthesisShape

Arrays = Mapping[str, npt.NDArray[Any]]


def resume(
    arrays: Arrays, name: str, encoder: SlimmableEncoder, synthesis: Synthesis, tail: Deltas, pixels: Tensor
) -> None:
    """Set the networks' weights and normalisations.

    Args:
        arrays: as `cut.tensors_of` gives them.
        name: that they were learned under.
        encoder, synthesis, tail: changed in place; of the widths and sizes that the bundle has, of at least its rank,
            and of at least as many blocks at each level.
        pixels: float32 [B, 3, S, S], normalised, on the networks' device; some hundred views.

    Raises:
        DataError: the bundle holds none of that name, or of another form.
    """
    try:
        latent = resume_encoder(arrays, name, encoder, pixels)
        # The last width is the widest; what the synthesis makes of its latents is what statistics are taken from.
        _synthesis(under(arrays, f"{name}/synthesis/"), synthesis, latent)
        changes = under(arrays, f"{name}/tail/")
        if changes:
            tail.take_up(changes)
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"the bundle's networks {name!r} are not those of the plan ({error}); let the plan begin with the backbone"
        ) from error


def resume_encoder(arrays: Arrays, name: str, encoder: SlimmableEncoder, pixels: Tensor) -> Tensor:
    """Set the encoder's alone, arguments as for `resume`; gives the latent of the last width.

    Raises:
        KeyError: the bundle holds none of that name, or of another form.
        RuntimeError: its tensors are of other shapes.
    """
    for width in encoder.widths:
        steps = [
            partial(_taken_up, layer, *_layer(arrays, name, encoder, width, at), width)
            for at, layer in enumerate(encoder.layers(width))
        ]
        with torch.no_grad():
            latent = run([layer.layer for layer in encoder.layers(width)], steps, pixels)
    return latent


def _layer(arrays: Arrays, name: str, encoder: SlimmableEncoder, width: str, at: int) -> tuple[Tensor, Tensor, Tensor]:
    place = f"{name}/encoder/{family(encoder.widths[width])}/{at}"
    keys = (f"{place}/weight", f"{place}/{width}/scale", f"{place}/{width}/bias")
    weight, scale, bias = (_float(arrays[key]) for key in keys)
    return weight, scale, bias


def _taken_up(layer: SlimConv, weight: Tensor, scale: Tensor, bias: Tensor, width: str, x: Tensor) -> Tensor:
    layer.weight.copy_(weight)
    norm = layer.norms[width]
    assert isinstance(norm, nn.BatchNorm2d)
    convolved = layer.convolved(x, width)
    _normalise(norm, convolved, scale.to(x.device), bias.to(x.device))
    made = layer.layer.finish(norm.eval()(convolved))
    return x + made if layer.layer.residual else made


def _synthesis(tensors: Mapping[str, Tensor], synthesis: Synthesis, latent: Tensor) -> None:
    stored = {key.replace("/", "."): value for key, value in tensors.items()}
    shape = _shape_of(stored, synthesis.shape)
    plain = Synthesis.of(shape, stored).to(latent.device)
    new = {id(m) for block in synthesis.blocks_beyond(shape) for m in _adding_nothing(block).modules()}
    theirs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    mine = [m for m in synthesis.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d) and id(m) not in new]
    convolutions = [m for m in mine if isinstance(m, nn.Conv2d)]
    norms = {before: m for before, m in pairwise(mine) if isinstance(m, nn.BatchNorm2d)}
    given: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_hook(lambda module, _, out: given.update({module: out})) for m in theirs]
    with torch.no_grad():
        plain(latent)
        for hook in hooks:
            hook.remove()
        for my, their in zip(convolutions, theirs, strict=True):
            assert their.bias is not None
            weight, bias = their.weight, their.bias
            if my is synthesis.last:
                weight, bias = _uncoloured(synthesis, weight, bias)
            norm = norms.get(my)
            if norm is None:
                assert my.bias is not None
                my.weight.copy_(weight)
                my.bias.copy_(bias)
                continue
            # The length of a row says nothing where it is normalised, but the optimiser's steps are relative to it.
            length = weight.flatten(1).norm(dim=1).clamp_min(1e-12)
            my.weight.copy_(weight / length[:, None, None, None])
            values = (given[their] - bias[:, None, None]) / length[:, None, None]
            _normalise(norm, values, length, bias)


def _adding_nothing(block: nn.Module) -> nn.Module:
    """A block whose last normalisation is 0, until it learns."""
    *_, last = (m for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return block


def _shape_of(tensors: Mapping[str, Tensor], shape: SynthesisShape) -> SynthesisShape:
    """The shape of a synthesis that differs from another one in the number of blocks alone, by its tensors."""
    blocks = {int(name.split(".")[1]) for name in tensors if ".inner." in name}
    levels, at = [], 2
    for channels, hidden, most in shape.levels:
        number = 0
        while at + number in blocks:
            number += 1
        if number > most:
            raise KeyError(f"{number} blocks of {channels} channels in place of {most} or fewer")
        levels.append((channels, hidden, number))
        at += number + 2
    return replace(shape, levels=tuple(levels))


def _uncoloured(synthesis: Synthesis, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the last layer before `spread` and `mean`, see `Synthesis.folded`."""
    root = torch.linalg.inv(synthesis.spread.double()).to(weight.dtype)
    spots = synthesis.shape.last**2
    rows = weight.reshape(-1, spots, weight.shape[1])
    offset = bias.reshape(-1, spots) - synthesis.mean[:, None]
    return torch.einsum("cd,dsi->csi", root, rows).reshape(weight.shape), (root @ offset).flatten()


def _normalise(norm: nn.BatchNorm2d, values: Tensor, scale: Tensor, bias: Tensor) -> None:
    """Let a normalisation of values [B, C, H, W], whose statistics it gets, be `scale * values + bias`."""
    assert norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(values.float(), (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(bias + scale * mean)


def _float(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))
