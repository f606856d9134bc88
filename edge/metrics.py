"""Metrics of the edge for Prometheus, in a registry of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ..models.operating_point import OperatingPoint
from .exceptions import ConfigError
from .ledger import Frame, Outcome
from .report import STAGES

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """What is counted. Labels take only values that the bundle and this file name."""

    def __init__(self) -> None:
        """Every outcome and stage is there from the start, at zero."""
        self.registry = CollectorRegistry()
        self.frames = Counter(
            "headrace_edge_frames", "Captured frames by outcome.", ["outcome"], registry=self.registry
        )
        self.sent_bytes = Counter(
            "headrace_edge_sent_bytes", "Bytes of packets handed to the stream.", registry=self.registry
        )
        self.stages = Histogram(
            "headrace_edge_stage_duration_seconds",
            "Time a frame spent in a stage.",
            ["stage"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.latency = Histogram(
            "headrace_edge_latency_seconds", "Capture to answer.", buckets=BUCKETS, registry=self.registry
        )
        self.points = Counter(
            "headrace_edge_operating_point", "Frames by chosen operating point.", ["point"], registry=self.registry
        )
        self.rate = Gauge(
            "headrace_edge_link_rate_bits_per_second",
            "Estimated rate of the link; not a number while unknown.",
            registry=self.registry,
        )
        self.connected = Gauge("headrace_edge_connected", "1 while the stream is up.", registry=self.registry)
        for outcome in Outcome:
            self.frames.labels(outcome)
        for stage in STAGES:
            self.stages.labels(stage)
        self.rate.set(math.nan)

    def declare(self, points: Iterable[OperatingPoint]) -> None:
        """Operating points that can be chosen, at zero."""
        for point in points:
            self.points.labels(point.name)

    def count(self, frame: Frame) -> None:
        """A frame has its outcome."""
        if frame.outcome is not None:
            self.frames.labels(frame.outcome).inc()
        if frame.point is not None:
            self.points.labels(frame.point.name).inc()
        if frame.latency_s is not None:
            self.latency.observe(frame.latency_s)
        for stage, seconds in frame.timings.items():
            self.stages.labels(stage).observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Answer scrapes over HTTP from a thread; returns the port, which is chosen freely for 0.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            server, _ = start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served on {host}:{port} ({error.strerror}); give another --metrics-port, 0 for any"
            ) from error
        return int(server.server_port)
