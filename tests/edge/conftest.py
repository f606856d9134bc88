"""What edge tests share: a tiny edge half with real ONNX graphs, and a scripted server that speaks the protocol."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from headrace.models.bundle import (
    FEATURES,
    PRESENCE,
    UNCUT,
    BackboneSpec,
    Bundle,
    ExitSpec,
    FilterSpec,
    Preprocessing,
    SplitSpec,
    head_file,
)
from headrace.models.bundle_exits import with_exits
from headrace.models.bundle_files import exit_file
from headrace.models.edge_half import file_names, write_edge_manifest
from headrace.models.exceptions import OperatingPointError
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos import messages
from headrace.protos.messages import BundleChunk, Label, Result, Status, TailOutput, Timing, Welcome
from onnx import TensorProto, helper, numpy_helper

SIZE, CHANNELS, PLACES, LEVELS, CLASSES = 32, 6, 4, 2, 10
SYMBOLS = CHANNELS * PLACES * PLACES


def _tables(spreads: Sequence[float]) -> dict[str, np.ndarray]:
    """Entropy tables from Laplace shapes: symbols -8..8 and an escape."""
    reach, rows = 8, []
    for spread in spreads:
        weight = np.exp(-np.abs(np.arange(-reach, reach + 1)) / spread)
        frequencies = np.maximum(1, np.round(weight / weight.sum() * 65000)).astype(np.int64)
        frequencies = np.append(frequencies, 0)
        frequencies[-1] = 65536 - frequencies.sum()
        rows.append(np.concatenate([[0], np.cumsum(frequencies)]).astype(np.int32))
    return {
        "cdf": np.stack(rows),
        "sizes": np.full(len(rows), len(rows[0]), np.int32),
        "offsets": np.full(len(rows), -reach, np.int32),
    }


def make_bundle(seed: int = 0) -> Bundle:
    """A bundle with one split point of two rate levels, two image points and a local one."""
    rng = np.random.default_rng(seed)
    split = SplitSpec(
        "stage.1", (CHANNELS, PLACES, PLACES), CHANNELS, ((SYMBOLS // 2, SYMBOLS),) * LEVELS, edge_share=0.5
    )
    tensors: dict[str, Any] = {
        "stage.1/gains": np.stack([np.full(CHANNELS, g, np.float32) for g in (4.0, 1.0)]),
        "stage.1/mean": np.zeros((CHANNELS, PLACES, PLACES), np.float32),
        "stage.1/encoder": rng.normal(size=(CHANNELS, CHANNELS)).astype(np.float32),
        "stage.1/decoder": rng.normal(size=(CHANNELS, CHANNELS)).astype(np.float32),
    }
    for side in ("rows", "columns"):
        tensors[f"stage.1/{side}"] = np.stack([np.eye(PLACES, dtype=np.float32)] * 2)
    tensors["stage.1/weights"] = np.ones((CHANNELS, PLACES, PLACES), np.float32)
    tensors["stage.1/order"] = np.arange(SYMBOLS, dtype=np.int32)
    tensors |= {f"stage.1/{k}": v for k, v in _tables([2.0 / (level + 1) for level in range(LEVELS)]).items()}
    tensors |= {f"stage.1/{level}/indexes": np.full(SYMBOLS, level, np.uint8) for level in range(LEVELS)}
    points = (
        OperatingPoint(0, Kind.FEATURE, "stage.1", 1.0, 0, "", 120, 160, 0.97, 0.5),
        OperatingPoint(1, Kind.FEATURE, "stage.1", 1.0, 1, "", 80, 100, 0.90, 0.5),
        OperatingPoint(40, Kind.IMAGE, rate_level=50, codec="webp", bytes_median=600, bytes_p95=900, accuracy=0.9),
        OperatingPoint(41, Kind.IMAGE, rate_level=50, codec="jpeg", bytes_median=900, bytes_p95=1200, accuracy=0.9),
        OperatingPoint(42, Kind.LOCAL, accuracy=1.0, edge_share=1.0),
    )
    return Bundle(
        name=f"tiny{seed}",
        task="classification",
        backbone=BackboneSpec("tiny", "none", "0" * 64),
        preprocessing=Preprocessing(36, SIZE, 127.0, 128.0),
        labels=tuple(f"class {i}" for i in range(CLASSES)),
        splits=(split,),
        operating_points=points,
        tensors=tensors,
        provenance={},
    ).check()


def make_filtered(threshold: float, classes: tuple[int, ...] = (3,)) -> Bundle:
    """The tiny bundle with a filter that takes a picture darker than `threshold`, 0..2, for empty."""
    bundle = make_bundle()
    tensors = {**bundle.tensors, "stage.1/filter/threshold": np.array([threshold], np.float32)}
    return replace(bundle, tensors=tensors, filter=FilterSpec(classes, 0.02)).check()


def make_exiting() -> Bundle:
    """The tiny bundle with an exit that takes bright pictures for class 3, and is the surer the brighter they are."""
    spec = ExitSpec("stage.1", 1.0, (0.0, 1.0, 0.0), 0.02)
    point = OperatingPoint(43, Kind.LOCAL, "stage.1", accuracy=0.6, edge_share=0.52)
    return with_exits(make_bundle(), (spec,), (point,), {})


def write_edge_half(folder: Path, bundle: Bundle, work: int = 1) -> Path:
    """Save the bundle with graphs that compute something: an average pooling, and a matrix product behind it.

    Args:
        work: how many matrix products of 256x256 the uncut graph does on top, to take its time.
    """
    bundle.save(folder)
    rng = np.random.default_rng(1)
    cell = SIZE // PLACES
    project = numpy_helper.from_array(rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32), "project")
    scale = numpy_helper.from_array(np.float32(1 / 128), "scale")
    front = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[cell, cell], strides=[cell, cell]),
    ]
    head = [*front, helper.make_node("Conv", ["pooled", "project"], ["latent"])]
    more = {}
    if bundle.filter is not None:
        # How bright the picture is, 0..2.
        head.append(helper.make_node("ReduceMean", ["scaled"], [PRESENCE], axes=[1, 2, 3], keepdims=0))
        more[PRESENCE] = [1]
    if bundle.exit_specs:
        shape = numpy_helper.from_array(np.array([1, CHANNELS, PLACES, PLACES]), "shape")
        head.append(helper.make_node("ReduceMean", ["scaled"], ["brightness"], axes=[1, 2, 3], keepdims=1))
        head.append(helper.make_node("Expand", ["brightness", "shape"], [FEATURES]))
        more[FEATURES] = [1, CHANNELS, PLACES, PLACES]
        weight = np.zeros((CHANNELS, CLASSES), np.float32)
        weight[:, 3] = 1.0
        exit_nodes = [
            helper.make_node("ReduceMean", [FEATURES], ["mean"], axes=[2, 3], keepdims=0),
            helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        ]
        given = helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, more[FEATURES])
        weights_of_exit = [numpy_helper.from_array(weight, "weight")]
        for spec in bundle.exit_specs:
            _save_graph(folder / exit_file(spec.split), exit_nodes, weights_of_exit, {"scores": [1, CLASSES]}, given)
    for split in bundle.splits:
        shapes = {"latent": [1, CHANNELS, PLACES, PLACES], **more}
        weights = [project, scale, *([shape] if bundle.exit_specs else [])]
        _save_graph(folder / head_file(split.name), head, weights, shapes)
    weights = [
        numpy_helper.from_array(rng.normal(size=(3 * PLACES * PLACES, 256)).astype(np.float32), "widen"),
        numpy_helper.from_array((rng.normal(size=(256, 256)) / 16).astype(np.float32), "square"),
        numpy_helper.from_array(rng.normal(size=(256, CLASSES)).astype(np.float32), "narrow"),
        numpy_helper.from_array(np.zeros((256, 256), np.float32), "rows"),
    ]
    uncut = [
        *front,
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "widen"], ["one"]),
        helper.make_node("Add", ["one", "rows"], ["w0"]),
    ]
    for i in range(work):
        uncut.append(helper.make_node("MatMul", [f"w{i}", "square"], [f"m{i}"]))
        uncut.append(helper.make_node("Tanh", [f"m{i}"], [f"w{i + 1}"]))
    uncut.append(helper.make_node("ReduceMean", [f"w{work}"], ["mean"], axes=[0], keepdims=1))
    uncut.append(helper.make_node("MatMul", ["mean", "narrow"], ["logits"]))
    uncut.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=1))
    _save_graph(folder / UNCUT, uncut, [scale, *weights], {"scores": [1, CLASSES]})
    write_edge_manifest(folder, bundle)
    return folder


def _save_graph(
    path: Path, nodes: list[Any], weights: list[Any], outputs: dict[str, list[int]], given: Any = None
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [given or helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        initializer=weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The tiny bundle."""
    return make_bundle()


@pytest.fixture(scope="session")
def edge_half(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its edge half."""
    return write_edge_half(tmp_path_factory.mktemp("half"), bundle)


@pytest.fixture(scope="session")
def other_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge half of another bundle."""
    return write_edge_half(tmp_path_factory.mktemp("other"), make_bundle(1))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@dataclass
class ScriptedServer:
    """Speaks the protocol and does what the test says.

    Attributes:
        half: the edge half that it gives and whose fingerprint it greets with.
        answer: what becomes of a frame: status and message, or None for no answer ever.
        outputs: of every answer.
        delay_s: before each answer.
        together: so many results are sent in one response.
    """

    half: Path
    answer: Callable[[int], tuple[Status, str] | None] = lambda _: (Status.OK, "")
    outputs: tuple[TailOutput, ...] = (TailOutput("classification", (Label(3, 0.5), Label(1, 0.25))),)
    delay_s: float = 0.0
    together: int = 1
    max_in_flight: int = 16
    max_packet_bytes: int = 2**20
    points: tuple[int, ...] = (0, 1, 40, 41)
    refuse: str | None = None
    chunks: Callable[[], AsyncIterator[BundleChunk]] | None = None
    port: int = 0
    hellos: list[Any] = field(default_factory=list)
    frames: list[Any] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Listen, on the same port again after `kill`."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        messages.add_HeadraceServicer_to_server(self.service(), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def service(self) -> messages.HeadraceServicer:
        """What answers calls, for a listener of the test's own."""
        return _Service(self)

    async def kill(self) -> None:
        """Break every connection at once."""
        await self._server.stop(None)

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def fingerprint(self) -> bytes:
        """Of the bundle it serves."""
        return Bundle.load(self.half).fingerprint


class _Service(messages.HeadraceServicer):
    def __init__(self, script: ScriptedServer) -> None:
        self.script = script
        self.ready: list[Result] = []

    async def Stream(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        script = self.script
        hello = messages.read_request(await context.read())
        script.hellos.append(hello)
        if script.refuse is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, script.refuse)
        if hello.fingerprint != script.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"fingerprint mismatch: device {hello.fingerprint.hex()[:16]}, server {script.fingerprint.hex()[:16]}",
            )
        await context.write(
            messages.welcome_response(
                Welcome(
                    script.fingerprint, script.max_packet_bytes, script.max_in_flight, "test", "tiny", script.points
                )
            )
        )
        lock, tasks = asyncio.Lock(), set()
        while (request := await context.read()) is not grpc.aio.EOF:
            frame = messages.read_request(request)
            script.frames.append(frame)
            script.arrived.set()
            task = asyncio.create_task(self._answer(frame, context, lock))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _answer(self, frame: Any, context: Any, lock: asyncio.Lock) -> None:
        from headrace.models.bitstream import Packet

        script = self.script
        packet = Packet.from_bytes(frame.packet)
        verdict = script.answer(packet.frame_id)
        if verdict is None:
            return
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        status, text = verdict
        outputs = script.outputs if status is Status.OK else ()
        result = Result(packet.frame_id, status, text, outputs, Timing(10, 20, 30, 100), 2, len(packet.slices))
        self.ready.append(result)
        if script.together == 1 or len(self.ready) == script.together:
            ready, self.ready = self.ready, []
            response = messages.result_response(result)
            if len(ready) > 1:
                response = messages.StreamResponse()
                for each in ready:
                    messages.fill_result(response.results.results.add(), each)
            async with lock:
                await context.write(response)

    async def GetBundle(self, request: Any, context: Any) -> None:  # noqa: N802
        try:
            chunks = self.script.chunks() if self.script.chunks else bundle_chunks(self.script.half, request.splits)
        except OperatingPointError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        async for chunk in chunks:
            await context.write(chunk)


def bundle_chunks(half: Path, splits: Sequence[str] = (), chunk_bytes: int = 1000) -> AsyncIterator[BundleChunk]:
    """An edge half as GetBundle sends it."""
    bundle = Bundle.load(half)
    return _chunks(half, bundle.fingerprint, [*file_names(bundle, splits), "edge.msgpack"], chunk_bytes)


async def _chunks(half: Path, fingerprint: bytes, names: list[str], chunk_bytes: int) -> AsyncIterator[BundleChunk]:
    for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
        data = (half / name).read_bytes()
        for at in range(0, max(len(data), 1), chunk_bytes):
            chunk = BundleChunk(data=data[at : at + chunk_bytes], files_left=left)
            if at == 0:
                chunk.fingerprint, chunk.name = fingerprint, name
                chunk.size, chunk.sha256 = len(data), hashlib.sha256(data).digest()
            yield chunk


@pytest.fixture
async def server(edge_half: Path) -> AsyncIterator[ScriptedServer]:
    """A scripted server that listens; it serves the tiny bundle."""
    script = ScriptedServer(edge_half)
    await script.start()
    yield script
    await script.kill()
