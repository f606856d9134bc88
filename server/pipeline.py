"""The way of a frame on the server. Read this first.

    admit ──► read ──► line ──► decode ──► batch ──► tail ──► result

A frame is **admitted** if there is room for it and its turn would come in time (`admission.py`): its first bytes say
for which tail it is, and a frame that is refused is looked at no further. Then its packet is **read** (is it one, and
of which operating point). It waits in a **line** until a worker thread **decodes** it (packet ->
symbols, or image -> pixels), then it is in a **batch** with other frames of its tail, and the **tail** answers it.
Lines and batches are ordered by deadline among the frames that are their device's due (`batcher.py`, `shares.py`), and
while one batch runs the next one is decoded. A frame that has the server to itself takes a shorter way, in one thread.
Whatever happens, every frame gets exactly one result: its status says how it ended.
`Pipeline.enter` and `Pipeline.go_on` are this as code; who calls them, and over what wire, is `session.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog

from ..models.bitstream import Packet, peek
from ..models.operating_point import OperatingPoint
from ..models.temporal import Reference
from ..protos.messages import Frame, Result, Status, Timing, micros
from .admission import Admission, Limits
from .batcher import batch_limit_s, deadline_at
from .decoder import PacketDecoder, frame_id_of
from .dispatch import Answer, Decoded, Dispatcher, Job, expired_error
from .engine import BatchSeconds, Engine, PacketInput, TailKey
from .exceptions import FrameError, InferenceError, InvalidError, NoReferenceError
from .metrics import Metrics
from .one_core import one_core
from .placing import placed
from .references import References
from .refusals import AFTER_S, BETWEEN_S, Moment
from .tracing import Stages, Tracer

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PipelineSettings:
    """See `ServerSettings` for what each one means; `max_wait_s` is in seconds."""

    max_packet_bytes: int
    queue_limit: int
    device_queue_limit: int
    queue_bytes: int
    max_batch: int
    max_wait_s: float
    decode_threads: int


class Pipeline:
    """Answers frames. Belongs to one event loop; only decoding and the engine run elsewhere.

    Attributes:
        admission: who waits here.
        moment: by whose end refusals are written.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        engine: Engine,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        """Make an idle one; `clock` gives seconds and is read from several threads."""
        self.clock = clock
        self.admission = Admission(Limits(settings.queue_limit, settings.device_queue_limit, settings.queue_bytes))
        self.moment = Moment(BETWEEN_S if engine.on_our_cores and one_core() else AFTER_S)
        self._max_packet_bytes = settings.max_packet_bytes
        self._engine = engine
        self._metrics = metrics
        self._tracer = tracer
        self._dispatcher = Dispatcher(
            engine,
            self.admission,
            metrics,
            clock,
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_s,
            decode_threads=settings.decode_threads,
            before_batch=self.moment.over,
        )
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.queue_depth.set_function(lambda: self.admission.waiting)

    @property
    def keeps_references(self) -> bool:
        """Whether frames can be predicted from others here: not where they are decoded elsewhere."""
        return not self._engine.decodes

    async def answer(self, decoder: PacketDecoder, frame: Frame, received: float, device: str = "") -> Result:
        """Take a frame all the way: admit, read, line, decode, batch, tail, result.

        Args:
            decoder: of the bundle that the edge holds.
            frame: packet and what remains of its deadline.
            received: when it came, by `clock`.
            device: whose share of the server it takes.

        Returns:
            Its result, whatever its status. `Timing.total_us` is still open: who hands it to gRPC knows it.
        """
        entered = self.enter(decoder, frame, received, device)
        return entered if isinstance(entered, Result) else await self.go_on(entered)

    def enter(
        self,
        decoder: PacketDecoder,
        frame: Frame,
        received: float,
        device: str = "",
        references: References | None = None,
        *,
        asked: bool = False,
    ) -> Job | Result:
        """The beginning of the way, at once: admit and read.

        Args:
            decoder, frame, received, device: as for `answer`.
            references: what is kept of its stream's frames; None where every frame is a key frame.
            asked: `turn_away` was asked about it just now, and did not refuse it.

        Returns:
            The admitted frame, which has to `go_on` or to `leave`, or the result of a refused one.
        """
        self._metrics.received(len(frame.packet))
        deadline = deadline_at(received, frame.remaining_ms)
        try:
            reading = self.clock()
            packet, point = decoder.read(frame.packet, self._max_packet_bytes)
            earlier = _earlier(packet, references)
            key = TailKey(decoder.bundle.fingerprint, point.split)
            if not asked and (error := self._refusal(key, reading, deadline, device)) is not None:
                raise error
            now = self.clock()
            place = self.admission.take(device, len(frame.packet), self._dispatcher.plan(key, now).cost)
        except FrameError as error:
            self._metrics.answered(error.status)
            return self._failure(frame_id_of(frame.packet), error)
        self._idle.clear()
        how = decoder.bundle.preprocessing
        answer = asyncio.get_running_loop().create_future()
        job = Job(place, frame, packet.frame_id, received, deadline, key, how, answer)
        place.pushed_out = job.fail
        keeps = references is not None and references.keep > 0
        job.decode = partial(self._decode, job, decoder, packet, point, now - reading, earlier, keeps)
        self._dispatcher.begin_alone(job)
        return job

    async def go_on(self, job: Job) -> Result:
        """The rest of the way of an admitted frame: line, decode, batch, tail, result."""
        result: Result | None = None
        try:
            if job.alone is not None:
                answer = await self._dispatcher.alone(job.alone)
            else:
                answer = await self._dispatcher.batched(job)
            outputs = placed(answer.outputs, (job.frame.width, job.frame.height), job.preprocessing)
            result = self._result(job, answer._replace(outputs=outputs))
        except FrameError as error:
            result = self._failure(job.frame_id, error)
        except Exception:
            log.exception("a frame failed", frame=job.frame_id)
            failure = InferenceError("the server failed on this frame; its log says why")
            result = self._failure(job.frame_id, failure)
        finally:
            self.leave(job, result)
        return result

    def leave(self, job: Job, result: Result | None = None) -> None:
        """An admitted frame is answered or, without a result, its caller went away. May be said twice."""
        if job.left:
            return
        job.left = True
        if job.alone is not None:
            job.alone.done.cancel()  # nothing happens where it is answered
        job.place.leave()
        self._metrics.answered(result.status if result else None)
        if not self.admission.open:
            self._idle.set()

    def turn_away(
        self, decoder: PacketDecoder, packet: bytes, remaining_ms: int, received: float, device: str
    ) -> tuple[int, FrameError] | bool:
        """Refuse a frame before its bytes are read, as far as its first ones say that it would be: under overload most
        frames come no further than this.

        Args:
            decoder, received, device: as for `enter`.
            packet: the packet's bytes.
            remaining_ms: of its deadline.

        Returns:
            Its id, and why it is refused; True: it is not; False: that cannot be told so early.
        """
        seen = peek(packet)
        if seen is None or (key := decoder.keys.get(seen[0])) is None:
            return False
        error = self._refusal(key, received, deadline_at(received, remaining_ms), device)
        if error is None:
            return True
        self._metrics.refused(len(packet), error.status, error.reason)
        return seen[1], error

    def _refusal(self, key: TailKey, now: float, deadline: float, device: str) -> FrameError | None:
        """Why a frame for that tail is not admitted now; None: it is, if the queue has room for it."""
        dispatcher = self._dispatcher
        plan, busy = dispatcher.plan(key, now), dispatcher.busy_s(now)
        batch = plan.full_batch_s(batch_limit_s(deadline - now)) if dispatcher.one_by_one else 0.0
        return self.admission.refusal(
            now, deadline, device=device, cost=plan.cost, alone=plan.alone, busy=busy, batch=batch
        )

    def refuse(self, frame: Frame, error: FrameError) -> Result:
        """The result of a frame that its stream may not send now."""
        self._metrics.received(len(frame.packet))
        self._metrics.answered(error.status)
        return self._failure(frame_id_of(frame.packet), error)

    def know(self, measured: Mapping[TailKey, BatchSeconds]) -> None:
        """Begin with what the warm-up of a bundle's tails took."""
        for key, seconds_of in measured.items():
            self._dispatcher.costs.know(key, seconds_of, self.clock())

    def forget(self, fingerprint: bytes) -> None:
        """Drop what is known about the tails of a bundle that is no longer served."""
        self._dispatcher.costs.forget(fingerprint)

    def drain(self) -> None:
        """Admit no more frames; those admitted are answered."""
        self.admission.draining = True

    async def idle(self) -> None:
        """Wait until every admitted frame is answered."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the worker threads and the batches, when no caller waits any more."""
        await self._dispatcher.close()

    def _decode(
        self,
        job: Job,
        decoder: PacketDecoder,
        packet: Packet,
        point: OperatingPoint,
        read_s: float,
        earlier: Reference | None,
        keeps: bool,
    ) -> Decoded:
        """Runs in a worker thread; where the engine decodes by itself there is nothing to do."""
        if self._engine.decodes:
            return Decoded(job.key, PacketInput(job.frame.packet), len(packet.slices), read_s)
        began = self.clock()
        if job.deadline <= began:
            raise expired_error(job.deadline - began, 0.0, "before it was decoded")
        if keeps:
            tail_input, job.reference = decoder.decode_video(packet, point, earlier)
        else:
            tail_input = decoder.decode(packet, point)
        return Decoded(job.key, tail_input, len(packet.slices), read_s + self.clock() - began)

    # Results

    def _result(self, job: Job, answer: Answer) -> Result:
        decoded = answer.decoded
        waited = max(0.0, answer.began - job.received - decoded.seconds)
        asyncio.get_running_loop().call_soon(self._metrics.queue.observe, waited)
        if self._tracer is not None and job.frame.trace:
            done = Stages(job.received, decoded.seconds, answer.began, answer.seconds, self.clock())
            self._tracer.answered(job.frame.trace, done)
        timing = Timing(queue_us=micros(waited), decode_us=micros(decoded.seconds), tail_us=micros(answer.seconds))
        return Result(
            job.frame_id,
            Status.OK,
            outputs=answer.outputs,
            timing=timing,
            queue_depth=answer.queue_depth,
            slices=decoded.slices,
        )

    def _failure(self, frame_id: int, error: FrameError) -> Result:
        if error.reason is not None:
            self._metrics.rejected(error.reason)
        return Result(
            frame_id,
            error.status,
            str(error),
            queue_depth=self.admission.waiting,
            retry_ms=retry_ms(error),
        )


def _earlier(packet: Packet, references: References | None) -> Reference | None:
    """What is kept of the frame that a packet is predicted from; None for a key frame.

    Raises:
        InvalidError: it came where no frame is kept.
        NoReferenceError: that one is not kept.
    """
    if packet.reference_id is None:
        return None
    if references is None:
        raise InvalidError("a predicted packet can only be decoded on the stream that it belongs to; send a key frame")
    found = references.find(packet.reference_id)
    if found is None:
        raise NoReferenceError(
            f"frame {packet.frame_id} is predicted from frame {packet.reference_id}, which is not among the "
            f"{len(references)} that are kept of this stream; send key frames until one is answered"
        )
    return found


def retry_ms(error: FrameError) -> int:
    """After how many milliseconds it makes sense to send again, as a result says it; 0: not known."""
    return max(1, round(error.retry_s * 1e3)) if error.retry_s else 0
