"""The daemon as a process of its own: real weights, real gRPC, real signals."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import EDGE_MANIFEST, Bundle, head_file
from headrace.models.codec import Codec
from headrace.models.edge_half import file_names, load_edge_half
from headrace.models.preprocessing import prepare
from headrace.models.repair.tail import repaired, tail_of
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Label, Result, Status
from PIL import Image

SERVE = "import sys; from headrace.server import config, daemon; sys.exit(daemon.run(config.ServerSettings.load()))"


@dataclass
class Daemon:
    process: subprocess.Popen[str]
    address: str
    metrics: str
    fingerprint: str
    cache: Path
    log: Path

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Daemon]]:
    running: list[Daemon] = []

    def start(**settings: object) -> Daemon:
        folder = tmp_path_factory.mktemp("serve")
        plain = {"port": 0, "metrics_port": 0, "cache_dir": folder / "cache"} | settings
        names = {f"HEADRACE_SERVER_{k.upper()}": str(v) for k, v in plain.items()}
        log = folder / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE],
                env={k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")} | names,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        said = json.loads(line)
        assert said.pop("event") == "listening"
        running.append(Daemon(process, cache=folder / "cache", log=log, **said))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.fixture(scope="module")
def daemon(launch: Callable[..., Daemon]) -> Daemon:
    return launch()


@pytest.fixture(scope="module")
def pixels(bundle: Bundle) -> dict[str, np.ndarray]:
    """Photographs that come with scikit-image, prepared."""
    names = ("chelsea", "coffee", "rocket", "astronaut")
    return {n: prepare(Image.fromarray(getattr(skimage.data, n)()), bundle.preprocessing) for n in names}


async def ask(address: str, bundle: Bundle, packets: list[Packet]) -> list[Result]:
    """Results of one stream, in order of frame ids, after its good end."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = messages.HeadraceStub(channel).Stream()
        await call.write(messages.hello_request(Hello(bundle.fingerprint, VERSION)))
        assert isinstance(messages.read_response(await call.read()), messages.Welcome)
        for packet in packets:
            await call.write(messages.frame_request(Frame(packet.to_bytes())))
        await call.done_writing()
        results = []
        while (response := await call.read()) is not grpc.aio.EOF:
            result = messages.read_response(response)
            assert isinstance(result, Result)
            results.append(result)
        assert await call.code() is grpc.StatusCode.OK
    return sorted(results, key=lambda r: r.frame_id)


def check_labels(labels: tuple[Label, ...], scores: torch.Tensor) -> None:
    """The five best of `scores`; a batch may round differently than one frame does."""
    assert np.allclose([x.score for x in labels], scores.topk(5).values, atol=1e-3)
    assert np.allclose([x.score for x in labels], [scores[x.index] for x in labels], atol=1e-3)


def test_it_says_where_it_listens(daemon: Daemon, bundle: Bundle) -> None:
    assert daemon.fingerprint == bundle.fingerprint.hex()
    with urllib.request.urlopen(f"http://{daemon.metrics}/readyz", timeout=10) as answer:
        assert answer.status == 200


async def test_feature_packets_get_the_labels_of_the_same_tail(
    daemon: Daemon, bundle: Bundle, codec: Codec, pixels: dict[str, np.ndarray]
) -> None:
    backbone = backbone_of(bundle)
    packets, scores = [], []
    for image, level, kept in zip(pixels.values(), (0, 1, 2, 7), (4, 4, 3, 2), strict=True):
        for spec in bundle.splits:
            point = next(p for p in bundle.operating_points if (p.split, p.rate_level) == (spec.name, level))
            with torch.inference_mode():
                size = bundle.preprocessing_at(spec.name).size
                scaled = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
                (features,) = backbone.head(spec.name)(torch.from_numpy(scaled)[None])
                latent = Encoder.of(bundle, spec.name)(features)[0].numpy()
                packets.append(codec.compress(latent, point, len(packets)).prefix(kept))
                symbols = torch.from_numpy(codec.decompress(packets[-1]))[None]
                gain = torch.from_numpy(bundle.gain(spec.name, level).copy())[None]
                whole = Decoder.of(bundle, spec.name), tail_of(bundle, spec.name, backbone)
                decoder, tail = repaired(bundle, spec.name, *whole)
                scores.append(tail(decoder(symbols, gain))[0][0])
    # A stream may have so many frames unanswered, and no more.
    results = [r for at in range(0, len(packets), 6) for r in await ask(daemon.address, bundle, packets[at : at + 6])]
    assert [r.frame_id for r in results] == list(range(len(packets)))
    for result, packet, expected in zip(results, packets, scores, strict=True):
        [output] = result.outputs
        assert (result.status, result.slices, output.tail) == (Status.OK, len(packet.slices), "classification")
        check_labels(output.labels, expected)
        timing = result.timing
        assert timing.decode_us > 0 and timing.tail_us > 0
        assert timing.queue_us + timing.decode_us + timing.tail_us <= timing.total_us


@pytest.mark.parametrize(("codec_name", "options"), [("webp", {"lossless": True}), ("jpeg", {"quality": 95})])
async def test_image_packets_get_the_labels_of_the_uncut_model(
    daemon: Daemon, bundle: Bundle, pixels: dict[str, np.ndarray], codec_name: str, options: dict[str, object]
) -> None:
    backbone = load_backbone(bundle.backbone.name)
    point = next(p for p in bundle.operating_points if p.codec == codec_name)
    packets, scores = [], []
    for frame_id, image in enumerate(pixels.values()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, codec_name, **options)
        packets.append(Packet(point.id, frame_id, (file.getvalue(),)))
        seen = np.array(Image.open(file).convert("RGB"))
        with torch.inference_mode():
            scores.append(backbone.uncut(torch.from_numpy(seen)[None])[0][0])
    for result, expected in zip(await ask(daemon.address, bundle, packets), scores, strict=True):
        check_labels(result.outputs[0].labels, expected)


async def test_a_device_gets_its_half_and_can_run_it(
    daemon: Daemon, bundle: Bundle, pixels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    names = (*file_names(bundle), EDGE_MANIFEST)
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        stub = messages.HeadraceStub(channel)
        for folder in (
            tmp_path / "first",
            tmp_path / "second",
        ):  # exported for the first, from the cache for the second
            folder.mkdir()
            stated: dict[str, tuple[int, bytes]] = {}
            current = ""
            fingerprint = bundle.fingerprint if folder.name == "second" else b""
            async for chunk in stub.GetBundle(messages.GetBundleRequest(fingerprint=fingerprint)):
                if chunk.name:
                    current = chunk.name
                    assert chunk.fingerprint == bundle.fingerprint
                    stated[current] = (chunk.size, chunk.sha256)
                assert len(chunk.data) <= 256 * 1024
                assert chunk.files_left == len(names) - len(stated)
                with (folder / current).open("ab") as file:
                    file.write(chunk.data)
            assert tuple(stated) == names
            for name, (size, digest) in stated.items():
                data = (folder / name).read_bytes()
                assert (len(data), hashlib.sha256(data).digest()) == (size, digest)
            assert load_edge_half(folder).fingerprint == bundle.fingerprint
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetBundle(messages.GetBundleRequest(fingerprint=bytes(32))).read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError, match="no split point 'nowhere'") as caught:
            await stub.GetBundle(messages.GetBundleRequest(splits=["nowhere"])).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert daemon.log.read_text().count("exported the edge half") == 1
    assert [path.name for path in daemon.cache.iterdir()] == [bundle.fingerprint.hex()]
    split = bundle.splits[0]
    session = onnxruntime.InferenceSession(tmp_path / "first" / head_file(split.name))
    [latent] = session.run(None, {"pixels": pixels["chelsea"][None]})
    assert latent.shape == (1, *split.latent_shape)


async def test_sigterm_answers_what_was_admitted_and_exits_with_0(
    launch: Callable[..., Daemon], bundle: Bundle, make_packet: Callable[..., Packet]
) -> None:
    daemon = launch(max_in_flight=64)
    packets = 40
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        call = messages.HeadraceStub(channel).Stream()
        await call.write(messages.hello_request(Hello(bundle.fingerprint, VERSION)))
        await call.read()
        for frame_id in range(packets):
            await call.write(messages.frame_request(Frame(make_packet(frame_id, "blocks.2@4").to_bytes())))
        first = messages.read_response(await call.read())
        daemon.process.send_signal(signal.SIGTERM)
        results = [first]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                results.append(messages.read_response(await call.read()))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "draining" in caught.value.details()
    assert daemon.process.wait(60) == 0, daemon.log.read_text()
    frames = [r for r in results if isinstance(r, Result)]
    assert len({r.frame_id for r in frames}) == len(frames)
    assert {r.status for r in frames} <= {Status.OK, Status.UNAVAILABLE}
    answered = [r.frame_id for r in frames if r.status is Status.OK]
    assert sorted(answered) == list(range(len(answered))), "what came before the signal was admitted, in order"
    assert "Traceback" not in daemon.log.read_text()


def test_an_idle_daemon_stops_at_once(daemon: Daemon) -> None:
    assert daemon.stop() == 0, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bundles": "/nowhere"}, "/nowhere/bundle.msgpack cannot be read"),
        ({"port": "x"}, "--port (or HEADRACE_SERVER_PORT) is 'x'"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(settings: dict[str, str], message: str) -> None:
    code = SERVE.replace("sys.exit(daemon.run(config.ServerSettings.load()))", "") + (
        "\nfrom headrace.models.exceptions import HeadraceError"
        "\ntry: sys.exit(daemon.run(config.ServerSettings.load()))"
        "\nexcept HeadraceError as error: sys.exit(str(error))"
    )
    names = {f"HEADRACE_SERVER_{k.upper()}": v for k, v in settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | names, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
