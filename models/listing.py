"""`headrace split --list`: where a backbone can be cut, as a table."""

from __future__ import annotations

from math import prod

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .backbones import EXACT, Backbone
from .exceptions import BackboneError
from .split import bar_columns, default_splits
from .zoo.catalogue import load_backbone
from .zoo.sources import Source


def list_cuts(asked: Source, console: Console | None = None) -> Backbone:
    """Find, measure and prove every cut, and print them.

    Args:
        asked: the backbone.
        console: where the table goes; standard output by default.

    Raises:
        BackboneError: it cannot be loaded, traced or cut.
    """
    console = console or Console()
    backbone = load_backbone(asked)
    usual = default_splits(backbone)
    table = Table(title=f"{backbone.spec.name}: {len(backbone.cuts)} cuts, {backbone.costs.all_macs / 1e6:,.0f} MMAC")
    for title in ("after", "maps", "MACs", "time", "bytes", "rejoin error"):
        left = title in ("after", "maps")
        table.add_column(title, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    with Progress(*bar_columns(), console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("head and tail joined", total=len(backbone.cuts))
        for cut in backbone.cuts:
            try:
                error = backbone.rejoin_error(cut.name)
                joined = f"{error:.1e}{'' if error <= EXACT else ' !'}"
            except BackboneError:
                joined = "cannot be packed"
            table.add_row(
                f"{cut.name}{' *' if cut.name in usual else ''}",
                ", ".join("x".join(map(str, shape)) for shape in cut.shapes),
                f"{backbone.costs.macs_share(cut):.3f}",
                f"{backbone.costs.time_share(cut):.3f}",
                f"{4 * sum(prod(s) for s in cut.shapes):,}",
                joined,
            )
            progress.advance(bar)
    console.print(table)
    console.print(
        "maps: channels x height x width; MACs and time: shares of the uncut model before it, time in PyTorch here; "
        "bytes: uncompressed float32; * taken when no --at is given"
    )
    return backbone
