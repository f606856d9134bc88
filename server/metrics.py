"""Metrics and probes: counters in a registry of their own, and an HTTP endpoint with /metrics, /livez and /readyz.

Sums add up: `headrace_server_received_frames_total` equals `headrace_server_frames_total` over all statuses plus the
frames that are being answered, and equals it exactly once the server has drained.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ..protos.messages import Status
from .exceptions import Reason, StartError
from .listening import bracketed

CANCELLED = "cancelled"
"""Status label of frames whose caller went away before they were answered."""

STATUSES = (*(s.name.lower() for s in Status if s is not Status.UNSPECIFIED), CANCELLED)
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
ALIVE_S = 15.0
"""Without a heartbeat of the event loop for this long, /livez says 503."""


class Tally(Collector):
    """A counter, by the values of one label or without any, that only the event loop counts on: it needs no lock.

    Under overload a frame is refused for the price of some Python, of which four of prometheus_client's counters would
    be a tenth.
    """

    def __init__(self, name: str, text: str, label: str, values: Iterable[str], registry: CollectorRegistry) -> None:
        """All values at 0; `label` is "" where there is none, with "" as the only value."""
        self._name, self._text, self._label = name, text, label
        self.counts = dict.fromkeys(values, 0)
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The counts now; another thread may ask."""
        family = CounterMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, count in self.counts.items():
            family.add_metric([value] if self._label else [], count)
        return [family]


class Metrics:
    """The server's counters; made once a server, so that two servers in one process do not share them."""

    def __init__(self) -> None:
        """Make them in a new registry, with every status at 0."""
        self.registry = CollectorRegistry()

        def tally(name: str, text: str, label: str = "", values: Iterable[str] = ("",)) -> Tally:
            return Tally(name, text, label, values, self.registry)

        self._received_frames = tally("headrace_server_received_frames", "Frames received.")
        self._received_bytes = tally("headrace_server_received_bytes", "Bytes of the packets received.")
        self._frames = tally("headrace_server_frames", "Frames answered, by status.", "status", STATUSES)
        self._stages = Histogram(
            "headrace_server_stage_duration_seconds",
            "Waiting and entropy decoding a frame; decoder and tail a batch.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rejected = tally(
            "headrace_server_rejected",
            "Frames refused before their tail, by reason: deadline (late, or it would have been), overload (its turn "
            "would have come too late), queue_full, device_full, pushed_out (for a device with fewer frames), "
            "in_flight (of one stream), invalid, draining.",
            "reason",
            [str(reason) for reason in Reason],
        )
        self.batch_size = Histogram(
            "headrace_server_batch_size", "Frames in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.queue_depth = Gauge(
            "headrace_server_queue_depth", "Frames admitted whose batch has not begun.", registry=self.registry
        )
        self.streams = Gauge("headrace_server_streams", "Open streams.", registry=self.registry)
        self.queue, self.decode, self.tail = (self._stages.labels(s) for s in ("queue", "decode", "tail"))
        self._names = {None: CANCELLED} | {status: status.name.lower() for status in Status}

    def received(self, size: int) -> None:
        """A frame of `size` bytes came."""
        self._received_frames.counts[""] += 1
        self._received_bytes.counts[""] += size

    def refused(self, size: int, status: Status, reason: Reason | None) -> None:
        """A frame of `size` bytes came and was refused at first sight."""
        self._received_frames.counts[""] += 1
        self._received_bytes.counts[""] += size
        self._frames.counts[self._names[status]] += 1
        if reason is not None:
            self._rejected.counts[reason] += 1

    def answered(self, status: Status | None) -> None:
        """A frame got its answer; None: its caller went away."""
        self._frames.counts[self._names[status]] += 1

    def rejected(self, reason: Reason) -> None:
        """A frame was refused."""
        self._rejected.counts[reason] += 1


class Probes:
    """What /livez and /readyz say. Written by the event loop, read by the endpoint's threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Alive, and not ready because it is loading."""
        self._clock = clock
        self._heartbeat = clock()
        self.not_ready: str | None = "loading"

    def beat(self) -> None:
        """The event loop turns."""
        self._heartbeat = self._clock()

    def alive(self) -> tuple[bool, str]:
        """Whether the event loop turned lately, and a text for people."""
        silent = self._clock() - self._heartbeat
        return (True, "ok") if silent < ALIVE_S else (False, f"the event loop has not turned for {silent:.0f} s")

    def ready(self) -> tuple[bool, str]:
        """Whether frames are taken, and a text for people."""
        return (True, "ok") if self.not_ready is None else (False, self.not_ready)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """Requests of probes are not worth a line each."""


class MetricsEndpoint:
    """The HTTP endpoint, in threads of its own: it answers while models load and when the event loop hangs."""

    def __init__(self, metrics: Metrics, probes: Probes, host: str, port: int) -> None:
        """Listen.

        Raises:
            StartError: the address cannot be bound.
        """
        self._metrics_app = make_wsgi_app(metrics.registry)
        self._probes = {"/livez": probes.alive, "/readyz": probes.ready}
        try:
            kind = _Server6 if ":" in host else _Server
            self._server = make_server(host.strip("[]"), port, self._app, kind, _QuietHandler)
        except OSError as error:
            raise StartError(
                f"metrics cannot listen on {host}:{port} ({error.strerror}); choose another --metrics-port"
            ) from error
        self.address = f"{bracketed(host)}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            page: Iterable[bytes] = self._metrics_app(environ, start_response)
            return page
        probe = self._probes.get(path)
        good, text = probe() if probe else (False, "there are /metrics, /livez and /readyz")
        status = "200 OK" if good else "503 Service Unavailable" if probe else "404 Not Found"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode() + b"\n"]
