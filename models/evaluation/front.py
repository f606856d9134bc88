"""`headrace eval front`: bytes that a share of the uncut accuracy takes, against what the device computes for it.

One point a split point, closed form and learned widths together, out of what `eval rd` measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..exceptions import DataError
from .curves import RATIOS, key
from .pictures import QUALITIES
from .plots import figure_with_axes, write_csv

CSV_FILE, PNG_FILE = "front.csv", "front.png"
MAIN = 0.95
"""The ratio that is drawn boldly."""
COST = ("gmac", "ms", "share_of_uncut")
BYTES = ("at", "at_ci", "at_hull", "at_hull_ci")
COLOURS = {0.98: "#9ca3af", 0.95: "#1d4ed8", 0.90: "#93c5fd"}
LINES = {"jpeg": ":", "webp": "--", "avif": "-."}


@dataclass(frozen=True, slots=True)
class Line:
    """A split point at a ratio, as a line of front.csv. Bytes are those of the cheapest measured point, with their 95 %
    interval, and those on the convex hull; empty where the ratio is not reached. `on_front`: no other split point takes
    fewer bytes and no more time."""

    split: str
    learned: bool
    gmac: float
    ms: float
    share_of_uncut: float
    ratio: str
    bytes: float | None
    bytes_low: float | None
    bytes_high: float | None
    bytes_hull: float | None
    on_front: bool


def read_rd(path: Path) -> dict[str, Any]:
    """What `headrace eval rd --json` wrote.

    Raises:
        DataError: the file cannot be read, or is not one of those.
    """
    try:
        found = json.loads(path.read_text())
        front_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not what this version's `headrace eval rd --json` writes ({error!r}); measure it anew"
        ) from error
    return dict(found)


def front_of(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The front of what `eval rd` measured.

    Args:
        measured: as `report.summary` gives it.

    Returns:
        `points` (`split`, `learned`, `gmac`, `ms`, `share_of_uncut`, and bytes by ratio: `at`, `at_hull`, with
        intervals), by rising share; `front` (ratio -> names of the split points that no other one beats in both bytes
        and share); `pictures` (codec -> `ms`, `share_of_uncut` of coding one, `at`); `images`, `uncut_top1`, `uncut`.
    """
    points = [
        {"split": name, "learned": bool(each["learned"]), **{k: each[k] for k in (*COST, *BYTES)}}
        for name, each in measured["splits"].items()
    ]
    points.sort(key=lambda p: float(p["share_of_uncut"]))
    uncut_ms = float(measured["uncut"]["ms"])
    return {
        "images": measured["images"],
        "uncut_top1": measured["uncut_top1"],
        "uncut": measured["uncut"],
        "points": points,
        "front": {key(ratio): _unbeaten(points, key(ratio)) for ratio in RATIOS},
        "pictures": {
            codec: {
                "ms": ms,
                "share_of_uncut": round(ms / uncut_ms, 4),
                "at": {key(ratio): measured["at"][key(ratio)][codec] for ratio in RATIOS},
            }
            for codec, ms in measured["picture_ms"].items()
            if codec in QUALITIES
        },
    }


def report_front(
    measured: Mapping[str, Any],
    json_file: Path | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Print a table, write what is asked for, and return what `--json` holds, see `front_of`.

    Args:
        measured: as `eval rd` gives it.
        json_file: where to write the result.
        output: folder for front.csv and front.png; None writes neither.
        console: where the table goes; standard output by default.

    Raises:
        DataError: matplotlib is missing for the picture.
    """
    result = front_of(measured)
    _print(console or Console(), result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(_lines(result), output / CSV_FILE)
        _draw(result, output / PNG_FILE)
    return result


def _unbeaten(points: Sequence[Mapping[str, Any]], ratio: str) -> list[str]:
    """Names of those that reach the ratio with fewer bytes than all with as little compute; by rising share."""
    kept: list[str] = []
    fewest = float("inf")
    reaching = [p for p in points if p["at"][ratio] is not None]
    for point in sorted(reaching, key=lambda p: (p["share_of_uncut"], p["at"][ratio])):
        if point["at"][ratio] < fewest:
            fewest = point["at"][ratio]
            kept.append(str(point["split"]))
    return kept


def _lines(result: Mapping[str, Any]) -> list[Line]:
    lines = []
    for point in result["points"]:
        for ratio in map(key, RATIOS):
            low, high = point["at_ci"][ratio] or (None, None)
            lines.append(
                Line(
                    split=point["split"],
                    learned=point["learned"],
                    gmac=point["gmac"],
                    ms=point["ms"],
                    share_of_uncut=point["share_of_uncut"],
                    ratio=ratio,
                    bytes=point["at"][ratio],
                    bytes_low=low,
                    bytes_high=high,
                    bytes_hull=point["at_hull"][ratio],
                    on_front=point["split"] in result["front"][ratio],
                )
            )
    return lines


def _print(console: Console, result: Mapping[str, Any]) -> None:
    table = Table(title=f"bytes for a share of the uncut top-1 ({result['images']} photographs); * on the front")
    for title in ("split point", "GMAC", "ms", "/ uncut", *map(key, RATIOS)):
        table.add_column(title, justify="left" if title == "split point" else "right")

    def told(name: str, at: Mapping[str, float | None]) -> list[str]:
        return [
            "—" if at[r] is None else f"{at[r]:.0f}{' *' if name in result['front'][r] else '  '}"
            for r in map(key, RATIOS)
        ]

    for p in result["points"]:
        costs = f"{p['gmac']:.4f}", f"{p['ms']:.2f}", f"{p['share_of_uncut']:.3f}"
        table.add_row(p["split"], *costs, *told(p["split"], p["at"]))
    for codec, p in result["pictures"].items():
        table.add_row(codec, "", f"{p['ms']:.2f}", f"{p['share_of_uncut']:.3f}", *told("", p["at"]))
    console.print(table)


def _draw(result: Mapping[str, Any], path: Path) -> None:
    figure, axes = figure_with_axes()
    for ratio in sorted(RATIOS, key=lambda r: r == MAIN):
        name, colour = key(ratio), COLOURS[ratio]
        reaching = [p for p in result["points"] if p["at"][name] is not None]
        front = [p for p in reaching if p["split"] in result["front"][name]]
        axes.step(*_xy(front, name), where="post", color=colour, linewidth=1, label=f"{name} of the uncut top-1")
        for learned, marker in ((False, "o"), (True, "^")):
            chosen = [p for p in reaching if p["learned"] is learned]
            if ratio == MAIN and chosen:
                axes.errorbar(
                    *_xy(chosen, name), _bars(chosen, name), fmt=marker, color=colour, elinewidth=0.8,
                    label="learned, 95 %" if learned else "closed form, 95 %",
                )  # fmt: skip
            else:
                axes.plot(*_xy(chosen, name), marker, color=colour, markersize=4)
    for point in result["points"]:
        if (y := point["at"][key(MAIN)]) is not None:
            axes.annotate(point["split"], (point["share_of_uncut"], y), xytext=(5, 5), textcoords="offset points")
    for codec, picture in result["pictures"].items():
        if (y := picture["at"][key(MAIN)]) is not None:
            axes.axhline(y, color="#6b7280", linewidth=0.8, linestyle=LINES[codec], label=f"{codec} at {key(MAIN)}")
    axes.set(
        yscale="log",
        xlabel="head and encoder, share of the uncut model's time on one core",
        ylabel="bytes a photograph",
        xlim=(0, max([1.0, *(p["share_of_uncut"] for p in result["points"])])),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _xy(points: Sequence[Mapping[str, Any]], ratio: str) -> tuple[list[float], list[float]]:
    return [p["share_of_uncut"] for p in points], [p["at"][ratio] for p in points]


def _bars(points: Sequence[Mapping[str, Any]], ratio: str) -> list[list[float]]:
    """How far each interval reaches below and above; not above where it has no upper end."""
    reach: list[list[float]] = [[], []]
    for p in points:
        value, (low, high) = p["at"][ratio], p["at_ci"][ratio] or (None, None)
        reach[0].append(max(0.0, value - (value if low is None else low)))
        reach[1].append(max(0.0, (value if high is None else high) - value))
    return reach
