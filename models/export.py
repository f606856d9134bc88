"""`headrace export`: the edge's half of a bundle, as ONNX files that need no torch to run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from .backbones import Backbone
from .bottleneck import Encoder
from .bundle import EDGE_MANIFEST, FEATURES, MANIFEST, PRESENCE, UNCUT, Bundle, head_file
from .bundle_files import exit_file
from .chain import Chain
from .detection.filter import WithFilter
from .detection.presence import Presence
from .edge_half import has_local, write_edge_manifest
from .exceptions import DataError
from .graph_rewrites import rewrite
from .zoo.catalogue import backbone_of


def export_edge_half(bundle: Bundle, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
    """Write an edge half into `folder` (see `edge_half` for its files).

    Args:
        bundle: the whole bundle; what its backbone is built from must be installed.
        folder: made if need be.
        note: called with the name of each file that is begun.

    Raises:
        BackboneError: the backbone's weights are missing or are not the bundle's.
        DataError: a whole bundle lies in `folder`.
    """
    own = bundle.folder is not None and folder.resolve() == bundle.folder.resolve()
    if own or ((folder / MANIFEST).exists() and not (folder / EDGE_MANIFEST).exists()):
        raise DataError(
            f"{folder} holds a whole bundle, of which the device's half would overwrite what the server needs; give "
            "another folder"
        )
    backbone = backbone_of(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    for spec in bundle.splits:
        note(head_file(spec.name))
        encoder: nn.Module = Encoder.of(bundle, spec.name)
        path, outputs = folder / head_file(spec.name), ["latent"]
        sized, _ = backbone.at(spec.name)
        if bundle.filters(spec.name):
            encoder = WithFilter(encoder, Presence.of(bundle, spec.name))
            outputs.append(PRESENCE)
        if (found := bundle.exit(spec.name)) is not None:
            encoder = WithFeatures(encoder)
            outputs.append(FEATURES)
            from .exits.graph import let_ask, write_exit  # which write their graphs as this does

            note(exit_file(spec.name))
            write_exit(backbone, found, folder / exit_file(spec.name))
        if len(outputs) == 1:
            write_onnx(sized, Only(backbone.head(spec.name), encoder), "latent", path)
        else:
            write_onnx(sized, Chain(backbone.head(spec.name), encoder).eval(), tuple(outputs), path)
        if found is not None and spec.name in backbone.narrow_exits:
            let_ask(backbone, found, path)
    if has_local(bundle):
        note(UNCUT)
        write_onnx(backbone, Only(backbone.uncut), "scores", folder / UNCUT)
    replace(bundle.for_edge(), folder=folder).save(folder)
    write_edge_manifest(folder, bundle)


class WithFeatures(nn.Module):
    """Features -> what the encoder gives for them, and they themselves, for the exit at that split point."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        given = self.encoder(features)
        return (*(given if isinstance(given, tuple) else (given,)), features)


class Only(nn.Module):
    """Modules in a row whose last gives one tensor: pixels -> that tensor, as ONNX files of the edge have it."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.chain = Chain(*modules).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        (output,) = self.chain(pixels)
        return output  # type: ignore[no-any-return]


def write_onnx(backbone: Backbone, module: nn.Module, output: str | tuple[str, ...], path: Path) -> None:
    """Write a network that takes `pixels` uint8 [1, S, S, 3] as one ONNX file with its weights inside.

    Args:
        backbone: says how large the pixels are.
        module: gives one tensor, or a tuple.
        output: name of what it gives, or of each part of it.
        path: where to.
    """
    size = backbone.preprocessing.size
    write_graph(module, torch.zeros(1, size, size, 3, dtype=torch.uint8), "pixels", output, path)


def write_graph(module: nn.Module, example: Tensor, name: str, output: str | tuple[str, ...], path: Path) -> None:
    """Write a network as one ONNX file; its input is called `name` and has the shape and type of `example`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter reports its progress on standard output, which belongs to the caller.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=[output] if isinstance(output, str) else list(output),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    rewrite(model)
    onnx.save(model, path)
