"""One replica of the tails on Ray: packets in, results out. What a `LocalEngine` is to one process.

It decodes by itself, so that front ends stay thin; while one batch is in its tail the next one is decoded. Between it
and a front end packets and results go as their own bytes. (Ray itself pickles what holds them together, between
processes of ours: keep its ports closed to everybody else.)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..models.bundle import Bundle, short
from ..protos import messages
from ..protos.messages import Result, Status
from .decoder import PacketDecoder
from .engine import LocalEngine, Runtime, TailInput, TailKey
from .exceptions import FrameError, StartError


class TailReplica:
    """Holds the tails of the bundles that its configuration names."""

    def __init__(
        self,
        device: str,
        runtime: Runtime,
        threads: int,
        max_batch: int,
        decode_threads: int,
        max_packet_bytes: int,
    ) -> None:
        """See `ServerSettings` for what each one means; nothing is loaded yet."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from .tail import set_up_torch, tails_of

        self._engine = LocalEngine(
            lambda bundle: tails_of(bundle, device, runtime, threads),
            lambda: set_up_torch(device, threads),
            max_batch,
        )
        self._threads = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._max_packet_bytes = max_packet_bytes
        self._decoders: dict[bytes, PacketDecoder] = {}
        self._revisions: dict[bytes, int] = {}
        self._started = False
        self._changing = asyncio.Lock()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Hold the tails of `config["bundles"]`: by fingerprint in hex, their folder and a number that rises when what
        lies there is to be loaded anew.

        Raises:
            HeadraceError: a folder does not hold the bundle of that fingerprint.
        """
        async with self._changing:
            if not self._started:
                await self._engine.start()
                self._started = True
            wanted = {bytes.fromhex(fingerprint): entry for fingerprint, entry in config["bundles"].items()}
            for fingerprint, (folder, revision) in wanted.items():
                if self._revisions.get(fingerprint) == revision:
                    continue
                bundle = await asyncio.to_thread(Bundle.load, Path(folder))
                if bundle.fingerprint != fingerprint:
                    raise StartError(
                        f"{folder} holds bundle {short(bundle.fingerprint)} here, not {short(fingerprint)}; give all "
                        "machines the same folder"
                    )
                decoder = PacketDecoder(bundle)
                await asyncio.to_thread(decoder.warm_up)
                await self._engine.load(bundle)
                self._decoders[fingerprint] = decoder
                self._revisions[fingerprint] = revision
            for fingerprint in [f for f in self._decoders if f not in wanted]:
                del self._decoders[fingerprint], self._revisions[fingerprint]
                await self._engine.unload(fingerprint)

    async def run(self, fingerprint: bytes, split: str, packets: list[bytes]) -> list[bytes]:
        """Answer packets of one tail: a `Result` of each, as bytes, without timings."""
        loop = asyncio.get_running_loop()
        decoder = self._decoders[fingerprint]
        decoded = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._decode, decoder, packet) for packet in packets)
        )
        good = [d for d in decoded if not isinstance(d, FrameError)]
        done = iter((await self._engine.run(TailKey(fingerprint, split), good)).outputs if good else ())
        results = []
        for each in decoded:
            outputs = each if isinstance(each, FrameError) else next(done)
            if isinstance(outputs, FrameError):
                results.append(Result(0, outputs.status, str(outputs)))
            else:
                results.append(Result(0, Status.OK, outputs=outputs))
        return [messages.result_message(result).SerializeToString() for result in results]

    async def process_id(self) -> int:
        """For tests: whom to kill."""
        return os.getpid()

    def _decode(self, decoder: PacketDecoder, data: bytes) -> TailInput | FrameError:
        try:
            packet, point = decoder.read(data, self._max_packet_bytes)
            return decoder.decode(packet, point)
        except FrameError as error:
            return error
