"""`headrace bench server`: everything in turn, a table, and the figures as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from ...models.bitstream import Packet
from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...models.extras import how_to_install
from ...models.operating_point import Kind
from ...server.config import SHIPPED_BUNDLE
from ..cores import all_cores
from ..processes import Server
from . import cells
from .load import Load, Tally, offer
from .plan import KEYS, Found, Plan
from .search import Capacity, capacity
from .systems import NAMES, Material, Place, bare_fps, devices, host, installed, our_server, spread

OVER = 1.2
"""Saturation is measured at so many times the bare loop's rate, which is more than any server of a tail can carry."""
LOSS_FPS = 60.0
"""Frames a second while servers drain and bundles are swapped."""
GREED_TURNS = 8
"""Turns in which the others are measured alone and beside a greedy device."""
GREED_DEVICES, GREED_FRAMES = 16, 500
"""Most devices beside the greedy one, and the frames that are due at each of them, in all turns together."""
IDLE_S = 10.0
"""Shortest measurement of an active device among idle ones."""
FRAMES, MOST_S = 400, 8.0
"""A load at which 99 % have to be in time is offered for so many frames, or seconds: one frame decides nothing."""
SLICES = 3
TIMES = 10
"""The overload, in peaks."""


def run(plan: Plan, json_file: Path | None = None) -> int:
    """Measure, print, and write `json_file` with exactly `KEYS`; what could not be measured is null there.

    Returns:
        Exit code: 0, or 143 after SIGTERM, by when everything that was started is stopped.

    Raises:
        HeadraceError: our server, or one that is installed, does not start.
    """
    console = Console(highlight=False, soft_wrap=True)
    cores = all_cores()
    server_core, load_core = min(cores), max(cores)
    if server_core == load_core:
        console.print("[yellow]note[/] this machine has one core: server and load share it, and the figures say little")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {load_core})
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-") as scratch:
            place = Place(frozenset({server_core}), plan.batch, Path(scratch))
            found = asyncio.run(_measure(plan, place, console))
    except asyncio.CancelledError:
        return 143
    finally:
        os.sched_setaffinity(0, before)
    for key in KEYS:
        value = found.figures[key]
        each = found.rounds.get(key)
        of = "devices" if key == "greed_points" else "rounds"
        rounds = f"  ({min(each):.2f} to {max(each):.2f} over {len(each)} {of})" if each else ""
        console.print(f"{key:24} {'[red]not measured[/]' if value is None else value}{rounds}")
    if json_file is not None:
        json_file.write_text(json.dumps(found.figures, indent=2) + "\n")
    return 0


async def _measure(plan: Plan, place: Place, console: Console) -> Found:
    measuring, loop = asyncio.current_task(), asyncio.get_running_loop()

    def stop() -> None:
        # Once: `timeout`, for one, sends it twice, and the second time would cut the cleaning up short.
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
        if measuring is not None:
            measuring.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    found = Found.kept(plan.keep)
    material = photographs_as(plan.point)
    sizes = [len(data) for data in material.data]
    console.print(
        f"{len(sizes)} packets of {plan.point}, {min(sizes)} to {max(sizes)} bytes; {plan.devices} devices, "
        f"{plan.pattern}; deadline {plan.deadline_s * 1e3:.0f} ms; batches of {plan.batch}; server on core "
        f"{min(place.cores)}."
    )
    if "compare" in plan.parts:
        await _compare(plan, place, material, found, console)
    if "bare" in plan.parts:
        await _beside_bare(plan, place, material, found, console)
    if "idle" in plan.parts and plan.idle > 0:
        await _idle(plan, place, material, found, console)
    if {"overload", "heed", "greed"} & set(plan.parts):
        await _hardships(plan, place, material, found, console)
    await _losses(plan, place, material, found, console)
    return found


async def _compare(plan: Plan, place: Place, material: Material, found: Found, console: Console) -> None:
    rivals = [kind for kind in plan.rivals if installed(kind)]
    for kind in plan.rivals:
        if kind not in rivals:
            remedy = escape(how_to_install("bench-server"))
            console.print(f"[bold red]{NAMES[kind]} is not installed and is not compared with[/]: {remedy}")
    small = smallest()
    async with host("bare", place) as (bare, _):
        for number in range(found.complete, plan.rounds):
            turns = ["headrace", "null", *rivals]
            turns = turns[number % len(turns) :] + turns[: number % len(turns)]
            for kind in turns:
                began = time.perf_counter()
                await _turn(kind, plan, place, bare, material, small, found)
                names = {"headrace": ("bare", "headrace"), "null": ("headrace null",)}
                said = _round_text(found, names.get(kind, (kind, f"{kind} null")))
                console.print(f"round {number + 1}, {NAMES[kind]}: {said} (took {time.perf_counter() - began:.0f} s)")
            found.complete = number + 1
            found.save()
    for kind, name in (("litserve", "litserve"), ("ray", "ray_serve")):
        found.ratio(f"over_{name}", "headrace", kind)
        found.ratio(f"null_over_{name}", "headrace null", f"{kind} null")
    found.save()


async def _beside_bare(plan: Plan, place: Place, material: Material, found: Found, console: Console) -> None:
    """Goodput at saturation in slices, each between two of both bare loops: what a core gives differs by a tenth from
    one minute to the next."""
    ratios: dict[str, list[float]] = {"over_bare_loop": [], "over_bare_loop_same_runtime": []}
    goodputs = list[float]()
    async with host("bare-torch", place) as (eager, _), host("bare", place) as (bare, _), our_server(place) as server:

        async def loops() -> tuple[float, float]:
            fps = [await bare_fps(each, plan.seconds, material, place.scratch) for each in (eager, bare)]
            return fps[0], fps[1]

        rates = [await loops()]
        async with cells.connected(server, plan.devices, material) as targets:
            await _offer(targets, plan, OVER * max(rates[0]), plan.seconds)  # everything is warm, and costs are known
            for _ in range(SLICES * plan.rounds):
                goodputs.append((await _offer(targets, plan, OVER * max(rates[-1]), 2 * plan.seconds)).goodput)
                rates.append(await loops())
                for which, each in enumerate(ratios.values()):
                    each.append(2 * goodputs[-1] / (rates[-2][which] + rates[-1][which]))
    for (key, each), fps, name in zip(
        ratios.items(), zip(*rates, strict=True), ("eager PyTorch", "our runtime"), strict=True
    ):
        found.rounds[key] = each
        found.figures[key] = round(spread(each)[0], 3)
        console.print(
            f"beside the bare loop ({name}): {spread(goodputs)[0]:.1f}/s in time where {OVER:g} times what the "
            f"faster loop carries are offered, {spread(each)[0]:.3f} of its {spread(fps)[0]:.1f}/s "
            f"({', '.join(f'{ratio:.2f}' for ratio in each)})"
        )
    found.save()


async def _turn(
    kind: str, plan: Plan, place: Place, bare: Any, material: Material, small: Material, found: Found
) -> None:
    """One system's turn in a round: what it carries with the tail, and with none."""
    if kind == "headrace":
        rate = await bare_fps(bare, plan.seconds, material, place.scratch)
        async with our_server(place) as server:
            fingerprint = bytes.fromhex(server.fingerprint)
            async with devices(kind, server.address, fingerprint, plan.devices, material) as targets:
                await _search(targets, plan, 0.5 * rate, found, "headrace")
        found.add("bare", (rate + await bare_fps(bare, plan.seconds, material, place.scratch)) / 2)
    elif kind == "null":
        async with host("null", place) as (_, said):
            fingerprint = bytes.fromhex(said["fingerprint"])
            async with devices(kind, said["address"], fingerprint, plan.devices, small) as targets:
                await _search(targets, plan, 1000.0, found, "headrace null")
    else:
        async with host(kind, place) as (_, said):
            async with devices(kind, said["address"], b"", plan.devices, material) as targets:
                await _search(targets, plan, 20.0, found, kind)
            async with devices(kind, said["address"], b"", plan.devices, None) as targets:
                await _search(targets, plan, 200.0, found, f"{kind} null")


async def _search(targets: Any, plan: Plan, first: float, found: Found, name: str) -> Capacity:
    known = found.rounds.get(name)
    await _offer(targets, plan, first / 2, 1.0)  # everything is warm
    # From the second round on it is known about where to look.
    begin, growth, steps = (known[-1] or first, 1.3, 3) if known else (first, 2.0, 4)

    async def offered(fps: float) -> Tally:
        return await _offer(targets, plan, fps, max(plan.seconds, min(MOST_S, FRAMES / fps)))

    carried = await capacity(offered, begin, steps=steps, growth=growth)
    found.add(name, carried.fps)
    found.add(f"{name} p99 ms", carried.p99_s * 1e3)
    return carried


async def _offer(targets: Any, plan: Plan, fps: float, seconds: float) -> Tally:
    return await offer(Load.even(len(targets), fps, seconds, plan.deadline_s, pattern=plan.pattern), targets)


async def _hardships(plan: Plan, place: Place, material: Material, found: Found, console: Console) -> None:
    async with our_server(place) as server:
        async with cells.connected(server, plan.devices, material) as targets:
            peak = await cells.peak(lambda fps: _offer(targets, plan, fps, plan.seconds))
        console.print(f"peak: {peak:.1f}/s in time, the most over loads that grow until it grows no more")
        for part, heed in (("overload", False), ("heed", True)):
            if part in plan.parts and plan.overload_s > 0:
                await _overload(server, plan, material, found, console, peak, heed)
        found.save()
        if "greed" in plan.parts:
            await _greed(server, plan, material, found, console, peak)


async def _greed(server: Server, plan: Plan, material: Material, found: Found, console: Console, peak: float) -> None:
    """One greedy device among fewer than there are elsewhere: each of the others needs frames enough of its own."""
    count = min(plan.devices, GREED_DEVICES)
    seen = await cells.greed(server, material, 0.5 * peak, count, GREED_FRAMES, plan.deadline_s, GREED_TURNS)
    worst = int(np.argmax(seen.points))
    console.print(
        f"fairness: {count} devices that offer {0.5 * peak:.1f}/s together, {min(seen.beside.due)} to "
        f"{max(seen.beside.due)} frames each: {seen.alone.share:.4f} in time alone, {seen.beside.share:.4f} beside one "
        f"that sends 100 times as much as one of them, {seen.mean:.2f} points less; the device that loses most "
        f"{seen.alone.shares[worst]:.4f} and {seen.beside.shares[worst]:.4f}, {seen.points[worst]:.2f} points "
        f"(standard error {seen.error:.2f} by chance); Jain's index alone {seen.jain:.3f}"
    )
    for name, counts in (("alone", seen.alone), ("beside", seen.beside)):
        console.print(f"  in time {name}, by device: {', '.join(f'{share:.3f}' for share in counts.shares)}")
    found.rounds["greed_points"] = list(seen.points)
    found.figures["greed_points"] = round(seen.points[worst], 2)
    found.figures["greed_points_mean"] = round(seen.mean, 2)
    found.figures["greed_points_error"] = round(seen.error, 2)
    found.save()


async def _idle(plan: Plan, place: Place, material: Material, found: Found, console: Console) -> None:
    async with our_server(place) as server:
        seconds = max(plan.seconds, IDLE_S)
        seen = await cells.idle(server, material, plan.idle, seconds, plan.deadline_s, plan.rounds)
    found.figures["idle_mb_per_device"] = round(seen.mb, 3)
    console.print(
        f"idle: {plan.idle} devices take {seen.mb:.3f} MB each; p99 of an active one "
        f"{', '.join(f'{p99 * 1e3:.1f}' for p99 in seen.without)} ms without, "
        f"{', '.join(f'{p99 * 1e3:.1f}' for p99 in seen.beside)} ms with them ({seen.longer:.3f} times)"
    )
    found.save()


async def _overload(
    server: Server, plan: Plan, material: Material, found: Found, console: Console, peak: float, heed: bool
) -> None:
    """Ten times too much in slices, each between two of saturation: what a core gives differs by a tenth from one
    minute to the next."""
    load = Load.even(plan.devices, TIMES * peak, plan.overload_s / SLICES, plan.deadline_s, plan.pattern)
    shares: list[float] = []
    tallies: list[Tally] = []
    begin = end = 0.0

    async def saturated() -> float:
        async with cells.connected(server, plan.devices, material) as targets:
            return (await _offer(targets, plan, OVER * peak, max(plan.seconds, load.seconds / 4))).goodput

    goodputs = [await saturated()]
    for _ in range(SLICES):
        over = await cells.overload(server, material, load, heed=heed)
        goodputs.append(await saturated())
        shares.append(2 * over.tally.goodput / (goodputs[-2] + goodputs[-1]))
        tallies.append(over.tally)
        begin, end = begin or over.mb_begin, over.mb_end
    share, least, most = spread(shares)
    latencies = [latency for tally in tallies for latency in tally.latencies]
    console.print(
        f"overload, devices that {'wait as they are told' if heed else 'heed nothing'}: "
        f"{sum(sum(t.due) for t in tallies)} frames due in {plan.overload_s:g} s; {share:.3f} of the goodput at "
        f"saturation ({least:.2f} to {most:.2f}; {', '.join(f'{t.goodput:.1f}' for t in tallies)}/s in time, "
        f"{', '.join(f'{fps:.1f}' for fps in goodputs)}/s at saturation before, between and after), p99 of the "
        f"answered {np.percentile(latencies or [np.nan], 99) * 1e3:.1f} ms, {sum(t.refused for t in tallies)} "
        f"refused, {sum(t.unsent for t in tallies)} held back by their devices, "
        f"{sum(t.unanswered for t in tallies)} without a status; memory {begin:.0f} to {end:.0f} MB; generator at "
        f"most {max(t.behind_s for t in tallies) * 1e3:.0f} ms behind"
    )
    if not heed:
        found.rounds["overload_goodput_share"] = shares
        found.figures["overload_goodput_share"] = round(share, 3)


async def _losses(plan: Plan, place: Place, material: Material, found: Found, console: Console) -> None:
    """Drains and swaps under load, some of it too much."""
    if plan.repetitions <= 0:
        return
    if "drain" in plan.parts:
        lost, admitted = await cells.lost_on_drain(place, material, LOSS_FPS, plan.repetitions)
        found.figures["lost_on_drain"] = lost
        console.print(
            f"drain: {lost} of {admitted} admitted frames lost over {plan.repetitions} times SIGTERM under load"
        )
    if "swap" in plan.parts:
        swapped, of = await cells.lost_on_swap(place, material, LOSS_FPS, plan.repetitions)
        found.figures["lost_on_swap"] = swapped
        console.print(f"swap: {swapped} of {of} admitted frames lost over {plan.repetitions} swaps under load")
    found.save()


def photographs_as(name: str, count: int = 8) -> Material:
    """Photographs as packets of an operating point, as a device would send them.

    Raises:
        HeadraceError: PyTorch or the photographs of scikit-image are missing.
    """
    try:
        import skimage.data
        import torch
        from PIL import Image
    except ImportError as error:
        raise HeadraceError(f"{error}; {how_to_install('server', 'bench')}") from error
    from ...models.bottleneck import Encoder
    from ...models.codec import Codec
    from ...models.preprocessing import prepare
    from ...models.zoo.catalogue import backbone_of

    bundle = Bundle.load(SHIPPED_BUNDLE)
    point = next(p for p in bundle.operating_points if p.name == name)
    head, encoder, codec = (
        backbone_of(bundle).head(point.split),
        Encoder.of(bundle, point.split),
        Codec(bundle),
    )
    whole = [Image.fromarray(getattr(skimage.data, each)()) for each in ("chelsea", "coffee", "rocket", "astronaut")]
    pictures = [*whole, *(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in whole)][:count]
    packets = []
    with torch.inference_mode():
        for number, picture in enumerate(pictures):
            pixels = torch.from_numpy(prepare(picture, bundle.preprocessing_at(point.split)).copy())[None]
            (features,) = head(pixels)
            packets.append(codec.compress(encoder(features)[0].numpy(), point, number))
    return Material(tuple(packets))


def smallest() -> Material:
    """A small packet, for the server that computes nothing."""
    from ...models.codec import Codec

    bundle = Bundle.load(SHIPPED_BUNDLE)
    features = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    point = min(features, key=lambda p: bundle.split(p.split).slices[p.rate_level][-1])
    zeros = np.zeros(bundle.split(point.split).latent_shape, np.int32)
    packet: Packet = Codec(bundle).compress_symbols(zeros, point, 0)
    return Material((packet,))


def _round_text(found: Found, names: Sequence[str]) -> str:
    """The latest figures of these names."""
    parts = []
    for name in names:
        p99 = found.rounds.get(f"{name} p99 ms")
        parts.append(f"{name} {found.rounds[name][-1]:.1f}/s" + (f" (p99 {p99[-1]:.0f} ms)" if p99 else ""))
    return ", ".join(parts)
