"""What the encoder makes of a stream whose frames the server keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headrace.edge.device import Device
from headrace.edge.encoder import Encoder, VideoPacket
from headrace.edge.engine import Engine
from headrace.edge.references import Earlier
from headrace.models.bitstream import Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.temporal import Scales
from headrace.models.temporal_fit import MoveCounts, with_tables

NOTHING = Earlier(None, 0, 1)


@pytest.fixture(scope="module")
def video_bundle(bundle: Bundle) -> Bundle:
    """The tiny bundle with tables for predicted frames."""
    counts, codec = MoveCounts(), Codec(bundle)
    for seed in range(20):
        point = bundle.operating_points[seed % 2]
        frames = [codec.quantise(latent, point).reshape(-1) for latent in latents(bundle, 5, 0.02 * (seed + 1), seed)]
        counts.add(frames, Scales(bundle.tables("stage.1"), bundle.indexes("stage.1", point.rate_level)))
    return with_tables(bundle, counts.freeze())


def latents(bundle: Bundle, frames: int, motion: float, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.laplace(0, 1, bundle.split("stage.1").latent_shape)
    return [(first + motion * rng.normal(size=first.shape) * i).astype(np.float32) for i in range(frames)]


def test_a_frame_is_predicted_and_can_be_made_a_key_frame(video_bundle: Bundle) -> None:
    encoder, codec, point = Encoder(video_bundle), Codec(video_bundle), video_bundle.operating_points[0]
    first, second = latents(video_bundle, 2, 0.01)
    key = encoder.video(first, point, 4, NOTHING)
    assert key.packet == encoder.feature(first, point, 4)
    assert (key.alone, key.slices, key.alone_bytes) == (None, 2, len(key.packet))
    video = encoder.video(second, point, 6, Earlier(key.reference, 2, 1))
    assert len(video.packet) < 0.8 * video.alone_bytes
    assert Packet.from_bytes(video.packet).reference_id == 4
    symbols, kept = codec.decompress_video(Packet.from_bytes(video.packet), key.reference)
    assert np.array_equal(symbols, codec.quantise(second, point))
    assert np.array_equal(kept.means, video.reference.means)
    alone = video.alone()
    assert alone.packet == encoder.feature(second, point, 6)
    assert alone.alone is None
    assert np.array_equal(alone.reference.means, 256 * video.reference.symbols.astype(np.int32))


def test_with_hysteresis_fewer_bytes_are_sent_and_the_key_frame_is_as_ever(video_bundle: Bundle) -> None:
    point = video_bundle.operating_points[0]
    first, second = latents(video_bundle, 2, 0.05)
    sizes = []
    for hysteresis in (0.0, 0.2, 0.5):
        encoder = Encoder(video_bundle, hysteresis)
        key = encoder.video(first, point, 1, NOTHING)
        video = encoder.video(second, point, 2, Earlier(key.reference, 1, 1))
        sizes.append(len(video.packet))
        assert video.alone().packet == encoder.feature(second, point, 2)
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_new_scene_is_a_key_frame_in_which_nothing_is_held(video_bundle: Bundle) -> None:
    point = video_bundle.operating_points[0]
    (first,), (other,) = latents(video_bundle, 1, 0.0, 1), latents(video_bundle, 1, 0.0, 2)
    encoder = Encoder(video_bundle, 0.1)
    key = encoder.video(first, point, 1, NOTHING)
    video = encoder.video(other, point, 2, Earlier(key.reference, 1, 1))
    assert video.alone is None
    assert video.packet == encoder.feature(other, point, 2)


def test_a_reference_of_another_split_point_is_not_taken(video_bundle: Bundle) -> None:
    point = video_bundle.operating_points[0]
    first, second = latents(video_bundle, 2, 0.01)
    encoder = Encoder(video_bundle, 0.1)
    key = encoder.video(first, point, 1, NOTHING)
    video = encoder.video(second, point, 2, Earlier(replace(key.reference, split="other"), 1, 1))
    assert video.alone is None


def test_stages_are_timed_as_a_stream_codes_them(video_bundle: Bundle, edge_half: Path, monkeypatch) -> None:
    engine, point = Engine(video_bundle, edge_half, Device()), video_bundle.operating_points[0]
    calls: list[tuple[int, Earlier, VideoPacket]] = []
    video = Encoder.video

    def watched(self: Encoder, latent: np.ndarray, point, frame_id: int, earlier: Earlier) -> VideoPacket:
        made = video(self, latent, point, frame_id, earlier)
        calls.append((frame_id, earlier, made))
        return made

    monkeypatch.setattr(Encoder, "video", watched)
    assert engine.time_stages([point], 3, predicted=True)["stage.1"] > 0
    assert [frame_id for frame_id, _, _ in calls] == [0, 1, 1, 1]
    (_, _, key), *others = calls
    assert key.reference is not None
    assert all(earlier.reference is key.reference and earlier.back == 1 for _, earlier, _ in others)
    assert all(made.reference.means is not None and made.packet for _, _, made in others)
    assert engine.time_stages([point], 3)["stage.1"] > 0
    assert len(calls) == 4, "where no frames are kept they are key frames"
