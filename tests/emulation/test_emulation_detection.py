"""A torchvision detector over the real stream: cut, served, fetched by an edge; boxes lie in the captured frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace.bench.processes import Server
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.measure import load_pixels
from headrace.models.operating_point import Kind
from headrace.models.preprocessing import placement
from headrace.models.split import fit
from headrace.models.tasks import Boxes
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from PIL import Image
from torchvision.ops import box_iou

AT = "body.features.0.10"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 blurred noises of 320x180 pixels, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    for i in range(12):
        noise = rng.integers(0, 256, (6 + i % 3, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 180), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.timeout(600)
async def test_boxes_of_a_torchvision_detector_come_back_in_the_captured_frame(
    pictures, tmp_path, start_edge, monkeypatch
):
    monkeypatch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
    backbone = load_backbone(Source("torchvision/ssdlite320_mobilenet_v3_large", seed=1, size=160))
    paths = sorted(pictures.iterdir())
    fit(backbone, [AT], paths[:10], paths[10:]).save(tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    point = next(p for p in bundle.operating_points if p.kind is Kind.FEATURE)
    flags = {"port": 0, "bundles": [str(tmp_path / "bundle")], "cache_dir": tmp_path / "server"}
    server = await Server.listening(flags, tmp_path / "server.log")
    try:
        edge = await start_edge(
            server=server.address,
            source=pictures,
            as_fast_as_possible=True,
            point=point.name,
            deadline_ms=20_000,
            max_frames=4,
        )
        assert await edge.end() == 0, edge.process.log.read_text()
    finally:
        server.kill()
        await server.wait()
    edge.assert_sums()
    lines = sorted(edge.frames, key=lambda line: line["frame"])
    assert [line["outcome"] for line in lines] == ["ok"] * 4
    place = placement(320, 180, bundle.preprocessing)
    for line, path in zip(lines, paths, strict=False):
        expected = _answer(backbone, bundle, point, path)
        theirs = torch.tensor([place.to_picture(*c) for c in expected.corners])
        mine = torch.tensor([b["box"] for b in line["boxes"]])
        assert len(mine) > 3 and (mine[:, 2] <= 320).all() and (mine[:, 3] <= 180).all() and (mine >= 0).all()
        same = box_iou(mine, theirs) * (
            torch.tensor([b["index"] for b in line["boxes"]])[:, None] == torch.tensor(expected.indexes)[None]
        )
        # The head runs in ONNX Runtime there and in PyTorch here; a symbol in a thousand may fall to the other side.
        assert float((same.amax(1) > 0.8).float().mean()) > 0.8


def _answer(backbone, bundle, point, path) -> Boxes:
    pixels = torch.from_numpy(load_pixels(path, bundle.preprocessing)[None].copy())
    with torch.inference_mode():
        latent = Encoder.of(bundle, point.split)(*backbone.head(point.split)(pixels))[0].numpy()
        symbols = Codec(bundle).decompress(Codec(bundle).compress(latent, point, 0))
        gain = torch.from_numpy(bundle.gain(point.split, point.rate_level).copy())[None]
        restored = Decoder.of(bundle, point.split)(torch.from_numpy(symbols)[None], gain)
        (answer,) = backbone.task.answers(backbone.tail(point.split)(restored))
    return answer
