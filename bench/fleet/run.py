"""`headrace bench fleet`: measures the constants, prints what the model says, and checks it by simulation."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...server.config import SHIPPED_BUNDLE
from ..cores import all_cores
from ..links.trace_set import read_windows
from ..server.systems import Place
from .cell import Cell, Fleet, Outcome, Templates
from .measure import measure
from .model import TARGET, Constants, Use, devices_per_core, mean_frame_s, need

SCALES = (0.1, 0.5, 1.0, 1.3, 2.0)
"""Devices a server as multiples of what the model says, in the sample that looks for the knee."""
SAMPLE_SERVERS = 12
PARTS = 20
SIZES = (10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated; see the command's help."""

    traces: Path
    devices: int = 100_000
    fps: float = 1.0
    seconds: float = 6.0
    deadline_s: float = 0.25
    devices_s: tuple[float, ...] = (0.3, 0.5)
    below_mbps: float = 5.0
    seed: int = 0
    jobs: int = 1

    @classmethod
    def of(
        cls,
        traces: Path,
        devices: int,
        fps: float,
        seconds: float,
        deadline_ms: float,
        devices_ms: str,
        seed: int,
        jobs: int = 1,
    ) -> Plan:
        """From the command's flags.

        Raises:
            HeadraceError: one of them cannot be used.
        """
        try:
            kinds = tuple(float(part) / 1e3 for part in devices_ms.split(","))
        except ValueError:
            raise HeadraceError(f"--devices-ms is a list of ms such as 300,500, not {devices_ms!r}") from None
        if min(devices, fps, seconds, deadline_ms, jobs, *kinds) <= 0:
            raise HeadraceError("--devices, --fps, --seconds, --deadline-ms, --devices-ms and --jobs are positive")
        return cls(traces, devices, fps, seconds, deadline_ms / 1e3, kinds, seed=seed, jobs=jobs)


def run(plan: Plan, json_file: Path | None = None, constants: Constants | None = None) -> int:
    """Measure (unless `constants` are given), print the model and the simulation, and write both to `json_file`.

    Returns:
        Exit code 0.

    Raises:
        HeadraceError: no traces, or a server does not start.
    """
    console = Console(highlight=False, soft_wrap=True)
    bundle = Bundle.load(SHIPPED_BUNDLE)
    windows = read_windows(plan.traces, seconds=60.0, below_bps=plan.below_mbps * 1e6, per_trace=1)
    if constants is None:
        with tempfile.TemporaryDirectory(prefix="headrace-") as scratch:
            place = Place(frozenset({min(all_cores())}), 8, Path(scratch))
            constants = asyncio.run(measure(place))
    _print_constants(constants, console)
    fleet = Fleet(
        tuple(bundle.operating_points),
        bundle.fingerprint,
        tuple(windows),
        plan.fps,
        plan.seconds,
        plan.deadline_s,
        plan.devices_s,
        seed=plan.seed,
    )
    templates = Templates(fleet)
    alone = simulate(fleet, templates, constants, 10, range(400))
    use = _use(alone, fleet)
    each = max(1, int(devices_per_core(constants, use)))
    tails, serving = mean_frame_s(constants, use)
    full = sum(mean_frame_s(constants, replace(use, batch=8)))
    console.print(
        f"Devices send {use.sent:.2f} of their frames when servers are idle, {use.bits / 8:.0f} bytes each. "
        f"A frame takes {1e3 * tails:.2f} ms of a core for decoding and tail and {1e3 * serving:.2f} ms for serving "
        f"({1e3 * full:.2f} ms in all in batches of 8): the model gives a core {each} devices at {plan.fps:g} frames/s "
        f"and a load of {TARGET}."
    )
    sizes = [asdict(need(n, constants, use)) for n in SIZES]
    _print_needs(sizes, use, console)
    console.print(f"{len(windows)} recorded links under {plan.below_mbps:g} Mbit/s; {SAMPLE_SERVERS} servers a row:")
    knee: list[dict[str, Any]] = []
    for scale in SCALES:
        count = max(1, round(scale * each))
        outcome = simulate(fleet, templates, constants, count, range(count * SAMPLE_SERVERS))
        knee.append(_row(outcome, count, 0.0))
        _print_row(knee[-1], console, f"{scale:g} x")
    began = time.perf_counter()
    whole = Outcome()
    for part in parts(plan.devices, each):
        whole.add(simulate(fleet, templates, constants, each, part, plan.jobs))
        took = time.perf_counter() - began
        if whole.devices < plan.devices:
            console.print(f"{whole.devices:,} devices in {took:.0f} s: {whole.on_time:.3f} of their frames in time")
    row = _row(whole, each, took)
    console.print(f"The whole fleet, {fleet.frames} frames of each device, in {took:.0f} s:")
    _print_row(row, console, "fleet")
    predicted = plan.fps * each * use.sent * (tails + serving)
    console.print(
        f"load of a server: model {predicted:.2f}, simulated {whole.load:.2f}; frames in time {whole.on_time:.3f}, "
        f"with idle servers {alone.on_time:.3f}"
    )
    if json_file is not None:
        found = {
            "constants": asdict(constants),
            "use": asdict(use),
            "devices_per_core": each,
            "needs": sizes,
            "alone": _row(alone, 10, 0.0),
            "knee": knee,
            "fleet": row,
            "load_model": predicted,
        }
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def parts(devices: int, each: int) -> list[range]:
    """The fleet in `PARTS` parts of whole servers: a large one takes long enough to want to see how it goes."""
    size = each * max(1, -(-devices // (each * PARTS)))
    return [range(begin, min(devices, begin + size)) for begin in range(0, devices, size)]


def read_constants(file: Path) -> Constants:
    """The constants that a run wrote to its JSON file.

    Raises:
        HeadraceError: it is no such file.
    """
    try:
        read = json.loads(file.read_text())["constants"]
        batch_s = {split: {int(n): float(s) for n, s in each.items()} for split, each in read.pop("batch_s").items()}
        decode_s = {split: float(seconds) for split, seconds in read.pop("decode_s").items()}
        return Constants(batch_s, decode_s, **{name: float(value) for name, value in read.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadraceError(
            f"{file} does not hold the constants that `bench fleet --json` writes: {error!r}"
        ) from error


def simulate(
    fleet: Fleet, templates: Templates, constants: Constants, each: int, numbers: Sequence[int], jobs: int = 1
) -> Outcome:
    """These devices, `each` to a server, one server after another, in so many processes."""
    servers = [numbers[begin : begin + each] for begin in range(0, len(numbers), each)]
    total = Outcome()
    if jobs == 1:
        for devices in servers:
            total.add(Cell(fleet, templates, constants, devices).run())
        return total
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (fleet, constants)) as pool:
        for outcome in pool.map(_one_server, servers, chunksize=max(1, min(50, len(servers) // (4 * jobs)))):
            total.add(outcome)
    return total


_prepared: list[tuple[Fleet, Templates, Constants]] = []


def _prepare(fleet: Fleet, constants: Constants) -> None:
    """In each process, once."""
    _prepared[:] = [(fleet, Templates(fleet), constants)]


def _one_server(devices: Sequence[int]) -> Outcome:
    ((fleet, templates, constants),) = _prepared
    return Cell(fleet, templates, constants, devices).run()


def _use(alone: Outcome, fleet: Fleet) -> Use:
    """How devices use servers, as seen where servers are idle."""
    bits = 8 * (alone.bytes / max(1, alone.sent) + fleet.overhead_bytes)
    # What is cheaper in batches is not batched at low load; frames are planned for as under load.
    return replace(Use(), fps=fleet.fps, sent=alone.sent / max(1, alone.frames), mix=dict(alone.split), bits=bits)


def _row(outcome: Outcome, each: int, took: float) -> dict[str, Any]:
    shares = np.array(outcome.shares)
    return {
        "devices": outcome.devices,
        "devices_per_server": each,
        "servers": outcome.servers,
        "frames": outcome.frames,
        "on_time": outcome.on_time,
        "accuracy": outcome.accuracy / max(1, outcome.frames),
        "sent": outcome.sent / max(1, outcome.frames),
        "refused_of_sent": outcome.refused / max(1, outcome.sent),
        "held": outcome.held / max(1, outcome.frames),
        "load": outcome.load,
        "mean_batch": outcome.computed / max(1, outcome.batches),
        "jain": float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())) if shares.any() else 0.0,
        "reasons": outcome.reasons,
        "seconds_taken": took,
    }


def _print_row(row: dict[str, Any], console: Console, name: str) -> None:
    console.print(
        f"{name:>6}: {row['devices']} devices, {row['devices_per_server']} a server of one core: load "
        f"{row['load']:.2f}, batches of {row['mean_batch']:.2f}, in time {row['on_time']:.3f}, on-time accuracy "
        f"{row['accuracy']:.3f}, refused {row['refused_of_sent']:.4f} of {row['sent']:.2f} sent, held back "
        f"{row['held']:.4f}, Jain's index "
        f"{row['jain']:.3f}"
    )


def _print_constants(c: Constants, console: Console) -> None:
    for split, known in c.batch_s.items():
        batches = ", ".join(f"{n}: {1e3 * s:.1f}" for n, s in known.items())
        console.print(f"{split or 'uncut':10} batch of {batches} ms; decoding {1e3 * c.decode_s[split]:.2f} ms")
    console.print(
        f"serving {1e3 * c.serve_s:.2f} ms CPU a frame; greeting {1e3 * c.greet_s:.2f} ms CPU; idle stream "
        f"{c.idle_mb:.3f} MB; server without devices {c.base_mb:.0f} MB; edge half {c.half_mb:.1f} MB; decision "
        f"{1e6 * c.decision_s:.0f} us"
    )


def _print_needs(sizes: Sequence[dict[str, Any]], use: Use, console: Console) -> None:
    console.print(f"On machines of {use.cores} cores, {use.memory_mb / 1e3:g} GB, {use.network_mbps / 1e3:g} Gbit/s:")
    for n in sizes:
        console.print(
            f"{n['devices']:>9,} devices: {n['frames_per_s']:,.0f} frames/s, {n['tail_cores']:,.0f} cores for tails, "
            f"{n['serving_cores']:,.0f} for serving; machines by connections {n['by_streams']:,.1f}, by memory "
            f"{n['by_memory']:,.2f}, by network {n['by_network']:,.1f}; {n['machines']:,} in all, decided by "
            f"{n['first']}; all greeted again in {n['back_s']:.2f} s, a bundle to all in {n['spread_s']:.0f} s"
        )
