"""`headrace eval detection`: bytes against COCO's average precision, for every operating point and for pictures.

Pictures are coded as they lie in the detector's input but without a letterbox's bars, which cost them no bytes here and
which the server would add again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..backbones import Backbone
from ..bitstream import Packet
from ..bottleneck import Encoder
from ..bundle import Bundle, Preprocessing, head_file
from ..exceptions import DataError
from ..export import Only, write_onnx
from ..measure import BATCH, load_pixels, measure
from ..onnx_time import edge_milliseconds
from ..operating_point import Kind
from ..preprocessing import placement
from ..split import bar_columns
from ..tasks import Answer, Detection
from ..zoo.catalogue import backbone_of
from .labelled import Labelled, labelled_boxes
from .precision import Judge, Precision

RATIOS = (0.98, 0.95, 0.90)
"""Shares of the uncut mAP50 at which bytes are stated."""
FAMILIES = ("deep", "light", "jpeg", "webp", "avif")
"""Closed-form cuts, learned light encoders, and picture codecs."""
QUALITIES: Mapping[str, Sequence[int]] = {
    "jpeg": (5, 10, 20, 30, 40, 50, 60, 70, 80, 90),
    "webp": (1, 10, 20, 30, 40, 50, 60, 70, 80, 90),
    "avif": (5, 10, 20, 30, 40, 50, 60, 70, 80, 90),
}
MINIMUM = 0.005
"""Score from which boxes are judged, as Darknet does; average precision looks at the whole ranking."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Row:
    """One operating point, or one quality of a picture codec, on the labelled pictures.

    Attributes:
        family: see `FAMILIES`.
        mean_bytes: whole packets.
        map, map50: COCO's average precision over overlaps of 0.5 to 0.95, and at 0.5.
        relative: mAP50 as a share of the uncut detector's on the same pictures.
        head_share: time of head and encoder on one core as a share of the uncut detector's; None for pictures.
        split: split point; empty for pictures.
    """

    name: str
    family: str
    mean_bytes: float
    map: float
    map50: float
    relative: float
    head_share: float | None = None
    split: str = ""


def evaluate_detection(
    bundle: Bundle,
    data: Path,
    limit: int = 0,
    json_file: Path | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return (and write) what `--json` holds.

    Args:
        bundle: whole bundle of a detector.
        data: labelled pictures, see `labelled`.
        limit: at most this many pictures; 0 for all.
        json_file: where to write the result.
        output: folder for detection.csv and detection.png; None writes neither.
        console: where the table goes; standard output by default.

    Returns:
        `uncut_map50`, `uncut_map`, `images`, `uncut_ms`, `at` (ratio -> bytes for each of `FAMILIES`; null where
        no point reaches it or there is none), `at_split` (split point -> ratio -> bytes), `points`.

    Raises:
        DataError: the bundle is for another task, or pictures or labels cannot be used.
    """
    backbone = backbone_of(bundle)
    if not isinstance(backbone.task, Detection):
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; `eval rd` measures that, `eval detection` boxes")
    backbone.parts = replace(backbone.parts, task=replace(backbone.task, minimum=MINIMUM))
    pictures = labelled_boxes(data, bundle.labels, limit)
    judge = Judge(pictures, bundle.preprocessing)
    paths = [p.path for p in pictures]
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        shares, uncut_ms = _head_shares(bundle, backbone, progress)
        bar = progress.add_task("operating points", total=len(paths))
        reference, measured = measure(backbone, bundle, paths, points, lambda n: progress.advance(bar, n))
        uncut = judge(reference)
        rows = [
            _row(p.name, "deep", measured[p.id].packet_bytes, judge(measured[p.id].answers), uncut, shares, p.split)
            for p in points
        ]
        codecs = [codec for codec in QUALITIES if codec != "avif" or features.check("avif")]
        bar = progress.add_task("pictures", total=len(paths) * sum(len(QUALITIES[c]) for c in codecs))
        for codec in codecs:
            for quality in QUALITIES[codec]:
                sizes, answers = picture_answers(backbone, pictures, codec, quality)
                rows.append(_row(f"{codec}@{quality}", codec, sizes, judge(answers), uncut))
                progress.advance(bar, len(paths))
    result = _summary(rows, uncut, len(paths), uncut_ms)
    _print(console or Console(), rows, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(rows, output / "detection.csv")
        _draw(rows, bundle.name, output / "detection.png")
    return result


def picture_answers(
    backbone: Backbone, pictures: Sequence[Labelled], codec: str, quality: int
) -> tuple[list[int], list[Answer]]:
    """Bytes of each picture's packet, and the uncut detector's answer to what comes out of it."""
    sizes: list[int] = []
    answers: list[Answer] = []
    how, uncut, batch = backbone.preprocessing, backbone.uncut, []
    with torch.inference_mode():
        for number, picture in enumerate(pictures, 1):
            received, size = without_bars(load_pixels(picture.path, how), picture.size, how, codec, quality)
            sizes.append(size)
            batch.append(received)
            if len(batch) == BATCH or number == len(pictures):
                answers += backbone.task.answers(uncut(torch.from_numpy(np.stack(batch))))
                batch = []
    return sizes, answers


def without_bars(
    pixels: Pixels, size: tuple[int, int], how: Preprocessing, codec: str, quality: int
) -> tuple[Pixels, int]:
    """Code what of a detector's input shows the picture, and put it back.

    Args:
        pixels: uint8 [S, S, 3].
        size: width and height of the picture.
        how: made the pixels.
        codec: jpeg, webp or avif.
        quality: 0..100.

    Returns:
        Pixels uint8 [S, S, 3] as a server would have them, and bytes of the packet.
    """
    place = placement(*size, how)
    left, top = max(place.left, 0), max(place.top, 0)
    right = min(how.size, place.left + round(size[0] * place.across))
    bottom = min(how.size, place.top + round(size[1] * place.down))
    file = io.BytesIO()
    Image.fromarray(pixels[top:bottom, left:right]).save(file, codec.upper(), quality=quality)
    received = pixels.copy()
    with Image.open(io.BytesIO(file.getvalue())) as coded:
        received[top:bottom, left:right] = np.asarray(coded.convert("RGB"))
    return received, len(Packet(0, 0, (file.getvalue(),)).to_bytes())


def _head_shares(bundle: Bundle, backbone: Backbone, progress: Progress) -> tuple[dict[str, float], float]:
    """Head and encoder's time as a share of the uncut detector's, one core, and that time in ms.

    What chooses boxes does not run in ONNX Runtime; its share is taken from PyTorch.
    """
    bar = progress.add_task("times on one core", total=len(bundle.splits) + 1)
    with TemporaryDirectory() as folder:
        paths = {"": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, backbone.traced_part, "scores", paths[""])
        progress.advance(bar)
        for spec in bundle.splits:
            paths[spec.name] = Path(folder) / head_file(spec.name)
            head = Only(backbone.head(spec.name), Encoder.of(bundle, spec.name))
            write_onnx(backbone, head, "latent", paths[spec.name])
            progress.advance(bar)
        times = edge_milliseconds(paths)
    uncut_ms = times.pop("") / backbone.costs.traced_share
    return {name: ms / uncut_ms for name, ms in times.items()}, uncut_ms


def _row(
    name: str,
    family: str,
    sizes: Sequence[int],
    found: Precision,
    uncut: Precision,
    shares: Mapping[str, float] = {},
    split: str = "",
) -> Row:
    relative = found.map50 / uncut.map50 if uncut.map50 else 0.0
    return Row(name, family, float(np.mean(sizes)), found.map, found.map50, relative, shares.get(split), split)


def cheapest(rows: Sequence[Row], families: Sequence[str] = FAMILIES) -> dict[str, dict[str, float | None]]:
    """Ratio -> family -> mean bytes of its cheapest row that reaches the ratio; None where none does."""
    at: dict[str, dict[str, float | None]] = {}
    for ratio in RATIOS:
        at[f"{ratio:.2f}"] = found = dict.fromkeys(families)
        for family in families:
            reaching = [r.mean_bytes for r in rows if r.family == family and r.relative >= ratio]
            found[family] = round(min(reaching), 1) if reaching else None
    return at


def _summary(rows: Sequence[Row], uncut: Precision, images: int, uncut_ms: float) -> dict[str, Any]:
    splits = tuple(dict.fromkeys(r.split for r in rows if r.split))
    return {
        "uncut_map50": uncut.map50,
        "uncut_map": uncut.map,
        "images": images,
        "uncut_ms": round(uncut_ms, 2),
        "at": cheapest(rows),
        "at_split": {s: cheapest([r for r in rows if r.split == s], ("deep", "light")) for s in splits},
        "points": [
            asdict(r) | {"mean_bytes": round(r.mean_bytes, 1), "head_share": r.head_share and round(r.head_share, 3)}
            for r in rows
        ],
    }


def _print(console: Console, rows: Sequence[Row], result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['images']} pictures, uncut mAP50 {result['uncut_map50']:.3f}, mAP {result['uncut_map']:.3f}, "
        f"{result['uncut_ms']:.0f} ms"
    )
    for title in ("operating point", "bytes", "mAP50", "relative", "mAP", "head / uncut"):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for r in rows:
        share = "" if r.head_share is None else f"{r.head_share:.2f}"
        table.add_row(r.name, f"{r.mean_bytes:.0f}", f"{r.map50:.3f}", f"{r.relative:.3f}", f"{r.map:.3f}", share)
    console.print(table)
    for split, at in {"": result["at"], **result["at_split"]}.items():
        for ratio, families in at.items():
            said = ", ".join(f"{f} {'-' if b is None else f'{b:.0f} bytes'}" for f, b in families.items())
            console.print(f"{f'cut after {split}, ' if split else ''}{ratio} of the uncut mAP50: {said}")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("matplotlib is missing for the picture; run `pip install matplotlib`") from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(r.split or r.family for r in rows):
        curve = sorted((r.mean_bytes, r.relative) for r in rows if (r.split or r.family) == name)
        axes.plot(*zip(*curve, strict=True), "x--" if name in FAMILIES else "o-", markersize=4, label=name)
    axes.axhline(0.95, color="#9ca3af", linewidth=1)
    axes.set(xscale="log", xlabel="bytes a picture", ylabel="share of the uncut mAP50", title=title, ylim=(0.4, 1.05))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


__all__ = ["FAMILIES", "Row", "cheapest", "evaluate_detection"]
