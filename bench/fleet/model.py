"""The capacity model: what a fleet needs, from what one frame, one stream and one greeting cost.

compute      frames/s x (decode + decoder and tail in batches)           -> cores (or GPUs) for tails
serving      frames/s x CPU of the stream, protobuf and event loop       -> cores for front ends
memory       devices x memory of an idle stream                          -> front ends
connections  devices / most streams of a front end                       -> front ends
arrivals     devices x CPU of a greeting (TLS handshake, Hello, Welcome) -> seconds until all are back
bundles      devices x bytes of an edge half / bytes a second            -> seconds until all have a new one
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TARGET = 0.7
"""Share of a core that is planned for: above it queues grow out of proportion (in an M/D/1 queue the mean wait at 0.7
is 1.2 service times, at 0.9 4.5; Pollaczek-Khinchine)."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What was measured.

    Attributes:
        batch_s: seconds of decoder and tail on one core, by split point ("" is the uncut model) and batch size.
        decode_s: seconds of entropy (or image) decoding of one packet, by split point.
        serve_s: CPU seconds of a frame besides: stream, protobuf, admission, event loop.
        greet_s: CPU seconds of a new stream without TLS.
        idle_mb: MB of an idle stream.
        base_mb: MB of a server without devices.
        half_mb: MB of a device's half of the bundle.
        decision_s: seconds of a device's decision.
    """

    batch_s: Mapping[str, Mapping[int, float]]
    decode_s: Mapping[str, float]
    serve_s: float
    greet_s: float
    idle_mb: float
    base_mb: float
    half_mb: float
    decision_s: float

    def frame_s(self, split: str, batch: int) -> float:
        """Seconds of one core for one frame in batches of that size, everything included."""
        return self.batch_of(split, batch) / batch + self.decode_s[split] + self.serve_s

    def batch_of(self, split: str, size: int) -> float:
        """Seconds of a batch; between measured sizes on a straight line, beyond them in proportion."""
        known = self.batch_s[split]
        if size in known:
            return known[size]
        below = max((n for n in known if n < size), default=0)
        above = min((n for n in known if n > size), default=0)
        if below and above:
            return known[below] + (known[above] - known[below]) * (size - below) / (above - below)
        return known[below] * size / below if below else known[above]


@dataclass(frozen=True, slots=True)
class Use:
    """How a fleet uses its servers.

    Attributes:
        fps: frames that each device captures a second.
        sent: share of them that it sends (the others are answered on the device, dropped or never in time).
        mix: shares of what is sent, by split point.
        bits: bits of a packet on the wire, framing included.
        batch: frames of a batch. At the load that is planned for, most frames find the server idle and are alone: the
            simulation corrected a first model that had counted on full batches.
        streams: most streams of one front end (`--max-streams`).
        memory_mb: memory of one machine.
        cores: of one machine.
        network_mbps: of one machine.
    """

    fps: float = 1.0
    sent: float = 0.9
    mix: Mapping[str, float] | None = None
    bits: float = 8 * 1500.0
    batch: int = 1
    streams: int = 4096
    memory_mb: float = 16_000.0
    cores: int = 4
    network_mbps: float = 1000.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a number of devices needs.

    Attributes:
        devices: that number.
        frames_per_s: that reach the servers.
        tail_cores: for decoding, decoders and tails, at `TARGET`.
        serving_cores: for streams.
        by_streams, by_memory, by_network: machines that connections, memory and network ask for.
        machines: the most of all.
        first: what decides it.
        back_s: until all have a stream again, when every machine's cores do nothing else.
        spread_s: until all have a new bundle, from these machines' networks alone.
    """

    devices: int
    frames_per_s: float
    tail_cores: float
    serving_cores: float
    by_streams: float
    by_memory: float
    by_network: float
    machines: int
    first: str
    back_s: float
    spread_s: float


def mean_frame_s(c: Constants, use: Use) -> tuple[float, float]:
    """Core seconds of a mean frame: for tails, and for serving."""
    mix = use.mix or dict.fromkeys(c.batch_s, 1 / len(c.batch_s))
    total = sum(mix.values())
    tails = sum(w / total * (c.batch_of(s, use.batch) / use.batch + c.decode_s[s]) for s, w in mix.items())
    return tails, c.serve_s


def devices_per_core(c: Constants, use: Use) -> float:
    """Devices that one core carries at `TARGET`, tails and serving together."""
    return TARGET / (use.fps * use.sent * sum(mean_frame_s(c, use)))


def need(devices: int, c: Constants, use: Use) -> Need:
    """What the model says for a number of devices."""
    frames = devices * use.fps * use.sent
    tails, serving = mean_frame_s(c, use)
    tail_cores, serving_cores = frames * tails / TARGET, frames * serving / TARGET
    asks = {
        "cores": (tail_cores + serving_cores) / use.cores,
        "connections": devices / use.streams,
        "memory": devices * c.idle_mb / max(1.0, use.memory_mb - c.base_mb),
        "network": frames * use.bits / (use.network_mbps * 1e6 * TARGET),
    }
    first = max(asks, key=lambda name: asks[name])
    machines = max(1, math.ceil(asks[first]))
    return Need(
        devices,
        frames,
        tail_cores,
        serving_cores,
        asks["connections"],
        asks["memory"],
        asks["network"],
        machines,
        first,
        devices * c.greet_s / (machines * use.cores),
        devices * c.half_mb * 8 / (machines * use.network_mbps),
    )
