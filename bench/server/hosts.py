"""What is measured beside our server, each as a program of its own:

    python -m headrace.bench.server.hosts KIND PORT BATCH

`bare`      decodes and answers batches in a loop, without any network, and says frames a second for each line it reads;
            `bare-torch` is the same with eager PyTorch in place of our server's runtime
`null`      our server with an engine that decodes and computes nothing
`litserve`  LitServe, packets as base64 in JSON, which is how it takes bytes; an empty packet is not computed
`ray`       plain Ray Serve with `serve.batch`, packets as bytes over HTTP; the same

All of them decode with our entropy decoder and answer with our tail in our server's runtime, in one thread. A line of
JSON says when each is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from ...models.bitstream import Packet
from ...models.bundle import Bundle
from ...server.config import SHIPPED_BUNDLE
from ...server.engine import Runtime

LABELS = [[0, 0.0]]
"""What is answered where nothing is computed."""


class Tail:
    """Packets in, best labels out, as our server makes them."""

    def __init__(self, runtime: Runtime = "onnx") -> None:
        """Load and warm up, with one thread."""
        from ...server.decoder import PacketDecoder
        from ...server.engine import TailKey
        from ...server.tail import load_tails

        self._bundle = Bundle.load(SHIPPED_BUNDLE)
        self._decoder = PacketDecoder(self._bundle)
        self._decoder.warm_up()
        self._tails = load_tails([self._bundle], "cpu", 1, runtime)
        self._key = TailKey

    def __call__(self, packets: Sequence[bytes]) -> list[list[list[float]]]:
        """Index and score of the best labels of each packet; of an empty one a constant."""
        if not all(packets):
            return [LABELS for _ in packets]
        inputs, split = [], ""
        for data in packets:
            packet = Packet.from_bytes(data)
            point = self._bundle.operating_point(packet.operating_point)
            inputs.append(self._decoder.decode(packet, point))
            split = point.split
        outputs = self._tails[self._key(self._bundle.fingerprint, split)](inputs)
        return [[[label.index, label.score] for label in each[0].labels] for each in outputs]


def say(**what: Any) -> None:
    """A line of JSON on standard output."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def bare(batch: int, runtime: Runtime) -> None:
    """For each line `SECONDS HEX[,HEX...]`: frames a second of batches of these packets."""
    tail = Tail(runtime)
    say(event="ready")
    for line in sys.stdin:
        seconds, _, texts = line.strip().partition(" ")
        packets = [bytes.fromhex(text) for text in texts.split(",")]
        batches = [[packets[(i + k) % len(packets)] for k in range(batch)] for i in range(0, len(packets), batch)]
        tail(batches[0])
        began, frames = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < float(seconds):
            tail(batches[frames // batch % len(batches)])
            frames += batch
        say(event="rate", fps=frames / took)


def null(batch: int) -> None:
    """Our server, which decodes and computes nothing."""
    from ...server.config import ServerSettings
    from ...server.daemon import Server
    from .null_engine import NullEngine

    async def serve() -> None:
        settings = ServerSettings.load(port=0, max_batch=batch, queue_limit=1024, max_in_flight=64, log_level="error")
        server = Server(settings, lambda _: NullEngine())
        await server.start()
        say(event="ready", address=server.address, fingerprint=server.fingerprint.hex())
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await server.drain()

    asyncio.run(serve())


def litserve(port: int, batch: int) -> None:
    """LitServe with one worker and its batching."""
    import litserve as ls

    from .litserve_api import Api

    api = Api(max_batch_size=batch, batch_timeout=0.005)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=30)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)


def ray(port: int, batch: int) -> None:
    """Plain Ray Serve with one replica and its batching."""
    # At its best: not as work in the background, and with time to start on one core.
    os.environ |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    import ray as ray_core
    from ray import serve
    from starlette.requests import Request

    ray_core.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    @serve.deployment(max_ongoing_requests=1024, num_replicas=1)
    class Replica:
        """The tail behind Ray Serve."""

        def __init__(self) -> None:
            self.tail = Tail()

        async def __call__(self, request: Request) -> Any:
            return await self.answer(await request.body())

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.005)
        async def answer(self, packets: list[bytes]) -> list[Any]:
            return [{"labels": labels} for labels in self.tail(packets)]

    deployment: Any = Replica  # the decorator's work, which its types do not say
    serve.run(deployment.bind(), name="tail", route_prefix="/")
    say(event="ready", address=f"127.0.0.1:{port}")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray_core.shutdown()


def main(arguments: Sequence[str]) -> int:
    """Run one of them until SIGTERM; `bare` until standard input ends."""
    kind, port, batch = arguments[0], int(arguments[1]), int(arguments[2])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = "1"
    if kind in ("bare", "bare-torch"):
        bare(batch, "torch" if kind == "bare-torch" else "onnx")
    elif kind == "null":
        null(batch)
    elif kind == "litserve":
        litserve(port, batch)
    else:
        ray(port, batch)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
