"""Predicted frames: the same symbols on both sides, whatever is lost or damaged, and how tables are fitted."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from headrace.models.bitstream import Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.entropy_coder import EntropyTables
from headrace.models.exceptions import BitstreamError, BundleError
from headrace.models.synthetic import moving
from headrace.models.temporal import (
    ACTIVITIES,
    CONTEXTS,
    FRACTIONS,
    RATIO_BITS,
    SPREADS,
    TABLES,
    UNIT,
    Prediction,
    Reference,
    Scales,
    TemporalTables,
    half_octave,
    ratios_of,
)
from headrace.models.temporal_fit import MoveCounts, with_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

DATA = Path(__file__).parents[1] / "data"


def scene(bundle: Bundle, split: str, frames: int, motion: float, seed: int) -> list[np.ndarray]:
    """Latents float32 [K, H, W] that move: each is the one before, a little nearer to 0, and something new."""
    rng = np.random.default_rng(seed)
    shape = bundle.split(split).latent_shape
    scale = np.zeros(shape, np.float32)
    order = bundle.order(split)
    scale.reshape(-1)[order] = np.linspace(4, 0.1, len(order))
    latents = [rng.laplace(0, scale).astype(np.float32)]
    keep = math.sqrt(max(0.0, 1 - motion**2))
    for _ in range(frames - 1):
        latents.append((keep * latents[-1] + motion * rng.laplace(0, scale)).astype(np.float32))
    return latents


def fitted(bundle: Bundle) -> Bundle:
    """The bundle with tables fitted on such scenes."""
    counts, codec = MoveCounts(), Codec(bundle)
    for seed, point_id in enumerate((1, 2, 3, 4) * 8):
        point = bundle.operating_point(point_id)
        indexes = bundle.indexes(point.split, point.rate_level)
        order = bundle.order(point.split)[: len(indexes)]
        latents = scene(bundle, point.split, 6, (0.02, 0.1, 0.3, 0.8)[seed % 4], 1000 + seed)
        frames = [codec.quantise(latent, point).reshape(-1)[order] for latent in latents]
        counts.add(frames, Scales(bundle.tables(point.split), indexes))
    return with_tables(bundle, counts.freeze())


@pytest.fixture(scope="session")
def video_bundle(small_bundle: Bundle) -> Bundle:
    return fitted(small_bundle)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([1, 2]), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.integers(0, 1000),
)
def test_both_sides_hold_the_same_at_any_motion_and_change_of_rate(video_bundle, levels, motion, seed):
    edge, server = Codec(video_bundle), Codec(video_bundle)
    kept = received = None
    for frame_id, (point_id, latent) in enumerate(
        zip(levels, scene(video_bundle, "a", len(levels), motion, seed), strict=True)
    ):
        point = video_bundle.operating_point(point_id)
        symbols = edge.quantise(latent, point)
        coded = edge.compress_video(symbols, point, frame_id, kept, 1)
        packet = Packet.from_bytes(coded.packet.to_bytes())
        found, received = server.decompress_video(packet, received)
        assert np.array_equal(found, server.decompress(edge.compress_symbols(symbols, point, frame_id)))
        kept = coded.reference
        assert np.array_equal(kept.symbols, received.symbols)
        assert np.array_equal(kept.means, received.means)
        assert len(packet.to_bytes()) - sum(map(len, packet.slices)) <= 24


def pair(bundle: Bundle, motion: float = 0.1, seed: int = 3, point_id: int = 1):
    """A codec, a reference, and a frame that was predicted from it, with its symbols."""
    codec, point = Codec(bundle), bundle.operating_point(point_id)
    first, second = (codec.quantise(x, point) for x in scene(bundle, point.split, 2, motion, seed))
    earlier = codec.compress_video(first, point, 10).reference
    coded = codec.compress_video(second, point, 12, earlier, 2)
    assert coded.packet.back == 2
    assert coded.packet.reference_id == 10
    return codec, point, earlier, coded, second


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prefix_decodes_and_the_rest_is_as_predicted(video_bundle, count):
    codec, point, earlier, coded, symbols = pair(video_bundle)
    found, reference = codec.decompress_video(coded.packet.prefix(count), earlier)
    assert reference is None  # a frame that was cut short is never predicted from
    order = video_bundle.order(point.split)[: len(earlier.symbols)]
    end = video_bundle.split(point.split).slices[point.rate_level][count - 1]
    assert np.array_equal(found.reshape(-1)[order[:end]], symbols.reshape(-1)[order[:end]])
    assert np.array_equal(found.reshape(-1)[order[end:]], earlier.symbols[end:])


def test_predicting_pays_and_a_new_scene_gets_a_key_frame(video_bundle):
    codec, point = Codec(video_bundle), video_bundle.operating_point(1)
    sizes = {}
    for motion in (0.02, 0.1, 0.3, 1.0):
        key = sent = 0
        earlier = None
        for frame_id, latent in enumerate(scene(video_bundle, "a", 8, motion, 77)):
            symbols = codec.quantise(latent, point)
            coded = codec.compress_video(symbols, point, frame_id, earlier, 1)
            earlier = coded.reference
            if frame_id:
                key += len(codec.compress_symbols(symbols, point, frame_id).to_bytes())
                sent += len(coded.packet.to_bytes())
        sizes[motion] = sent / key
    assert sizes[0.02] < sizes[0.1] < sizes[0.3] < sizes[1.0] <= 1.0
    assert sizes[0.02] < 0.5


def test_a_scene_that_stands_still_costs_one_byte_in_its_slices(video_bundle):
    codec, point = Codec(video_bundle), video_bundle.operating_point(1)
    symbols = codec.quantise(scene(video_bundle, "a", 1, 0.0, 5)[0], point)
    first = codec.compress_video(symbols, point, 1)
    again = codec.compress_video(symbols, point, 2, first.reference, 1)
    assert sum(map(len, again.packet.slices)) == 1
    assert np.array_equal(codec.decompress_video(again.packet, first.reference)[0], codec.decompress(first.packet))


def test_a_predicted_frame_becomes_a_key_frame_from_what_was_kept(video_bundle):
    codec, point, _, coded, symbols = pair(video_bundle)
    assert codec.compress_reference(coded.reference, point, 12) == codec.compress_symbols(symbols, point, 12)


def test_without_its_reference_it_is_refused(video_bundle, small_bundle):
    codec, _, earlier, coded, _ = pair(video_bundle)
    with pytest.raises(BitstreamError, match="not at hand"):
        codec.decompress_video(coded.packet, None)
    with pytest.raises(BitstreamError, match="not at hand"):
        codec.decompress_video(coded.packet, replace(earlier, split="b"))
    with pytest.raises(BitstreamError, match="not at hand"):  # an older bundle
        Codec(small_bundle).decompress_video(coded.packet, earlier)


def test_a_bundle_without_tables_makes_key_frames(small_bundle):
    codec, point = Codec(small_bundle), small_bundle.operating_point(1)
    symbols = codec.quantise(scene(small_bundle, "a", 1, 0.0, 5)[0], point)
    coded = codec.compress_video(symbols, point, 3)
    assert coded.packet == codec.compress_symbols(symbols, point, 3)
    assert (coded.reference, codec.predicts, codec.reference_bytes()) == (None, False, 0)


def test_what_a_frame_keeps_is_bounded(video_bundle):
    codec, _, earlier, coded, _ = pair(video_bundle)
    assert max(earlier.nbytes, coded.reference.nbytes) <= codec.reference_bytes()
    assert codec.reference_bytes() == 6 * max(ends[-1] for s in video_bundle.splits for ends in s.slices)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100), st.data())
def test_damaged_slices_are_refused_or_decode_to_symbols(video_bundle, seed, data):
    """Past the CRC: whatever bytes come, they are an error or symbols within bounds, and nothing is read beyond."""
    codec, point, earlier, coded, _ = pair(video_bundle, seed=seed)
    slices = [bytearray(each) for each in coded.packet.slices]
    where = data.draw(st.integers(0, len(slices) - 1))
    if slices[where]:
        at = data.draw(st.integers(0, len(slices[where]) - 1))
        slices[where][at] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.integers(1, 4))
    damaged = Packet(point.id, 12, tuple(bytes(each) for each in slices), 2).prefix(kept)
    try:
        found, _ = codec.decompress_video(damaged, earlier)
    except BitstreamError:
        return
    assert np.abs(found).max() < 2**15


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_garbage_is_refused_or_decodes_to_symbols(video_bundle, slices):
    codec, point, earlier, _, _ = pair(video_bundle)
    try:
        found, _ = codec.decompress_video(Packet(point.id, 12, tuple(slices), 2), earlier)
    except BitstreamError:
        return
    assert np.abs(found).max() < 2**15


def test_every_flipped_byte_of_a_packet_is_refused(video_bundle):
    data = pair(video_bundle)[3].packet.to_bytes()
    for at in range(len(data)):
        for flip in (1, 128, 255):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(BitstreamError):
                Packet.from_bytes(bytes(damaged))
    for end in range(len(data)):
        with pytest.raises(BitstreamError):
            Packet.from_bytes(data[:end])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.2, 0.5]))
def test_what_is_held_is_within_its_bounds_and_costs_no_more(video_bundle, seed, hysteresis):
    codec, point = Codec(video_bundle), video_bundle.operating_point(1)
    first, second = scene(video_bundle, "a", 2, 0.1, seed)
    earlier = codec.compress_video(codec.quantise(first, point), point, 1).reference
    held, plain = codec.hold(second, point, earlier, hysteresis), codec.quantise(second, point)
    order = video_bundle.order("a")[: len(earlier.symbols)]
    scaled = (second * video_bundle.gain("a", 0)[:, None, None]).reshape(-1)[order]
    found, changed = held.reshape(-1)[order], (held != plain).reshape(-1)[order]
    assert (np.abs(scaled - found) < 0.5 + hysteresis + 1e-6).all()
    assert (found[changed] == earlier.symbols[changed]).all()
    stays = np.abs(scaled - earlier.symbols) < 0.5 + hysteresis
    assert (found[stays] == earlier.symbols[stays]).all()
    assert np.array_equal(codec.hold(second, point, earlier, 0.0), plain) or (np.abs(scaled % 1 - 0.5) < 1e-6).any()
    sizes = [len(codec.compress_video(s, point, 2, earlier, 1).packet.to_bytes()) for s in (held, plain)]
    # Where little is held, its bits and the frame's activity may round to a byte more.
    assert sizes[0] <= sizes[1] + 2


@pytest.mark.parametrize("hysteresis", [0.05, 0.2, 0.5])
def test_what_is_held_costs_less(video_bundle, hysteresis):
    codec, point, sizes = Codec(video_bundle), video_bundle.operating_point(1), np.zeros(2)
    for seed in range(20):
        first, second = scene(video_bundle, "a", 2, 0.1, seed)
        earlier = codec.compress_video(codec.quantise(first, point), point, 1).reference
        both = codec.hold(second, point, earlier, hysteresis), codec.quantise(second, point)
        sizes += [len(codec.compress_video(symbols, point, 2, earlier, 1).packet.to_bytes()) for symbols in both]
    assert sizes[0] < 0.99 * sizes[1]


# --- integers --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**80))
def test_half_octaves_are_rounded_exactly(value):
    found = half_octave(value)
    # 2 log2(value) lies within half of it: value^4 within 2^(2 found -+ 1).
    assert 2 ** (2 * found) <= 2 * value**4 < 2 ** (2 * found + 2)


@given(st.floats(2**-10, 2**10, width=32), st.floats(2**-10, 2**10, width=32))
def test_ratios_of_gains_are_exact(to, of):
    (found,) = ratios_of(np.array([to], np.float32), np.array([of], np.float32)).tolist()
    exact = Fraction(to) / Fraction(of) * 2**RATIO_BITS
    assert found == 1 << 24 if exact >= 1 << 24 else abs(found - exact) <= Fraction(1, 2)


def test_a_reference_in_the_steps_of_another_rate_level():
    reference = Reference("a", 0, np.array([4, -4, 1, 0], np.int16), np.array([4, -4, 1, 0], np.int32) * UNIT)
    half = np.full(4, (1 << RATIO_BITS) // 2, np.int64)
    coarser = Prediction.at(reference, 3, half[:3])
    assert coarser.means.tolist() == [2 * UNIT, -2 * UNIT, UNIT // 2]
    assert coarser.symbols.tolist() == [2, -2, 1]
    finer = Prediction.at(reference, 6, np.full(6, 3 << RATIO_BITS, np.int64))
    assert finer.symbols.tolist() == [12, -12, 3, 0, 0, 0]


def test_means_follow_the_symbols():
    before = Prediction(np.array([2], np.int32), np.array([2 * UNIT], np.int32))
    moved = Reference.of("a", 0, np.array([4], np.int32), before)
    assert moved.means.tolist() == [2 * UNIT + 2 * UNIT * 5 // 16]
    key = Reference.of("a", 0, np.array([4], np.int32), None)
    assert key.means.tolist() == [4 * UNIT]


def test_contexts_are_mirrored():
    off = np.array([0, 7, 8, 40, 72, 104, 128], np.int32)
    zero = np.zeros(len(off), np.int32)
    signs, at_zero = Prediction(zero, off).contexts()
    assert signs.tolist() == [1] * len(off)
    assert at_zero.tolist() == [0, 0, 1, 2, 3, 4, 4]
    signs, mirrored = Prediction(zero, -off).contexts()
    assert signs.tolist() == [1, -1, -1, -1, -1, -1, -1]
    assert mirrored.tolist() == at_zero.tolist()
    one = np.ones(len(off), np.int32)
    _, up = Prediction(one, one * UNIT + off).contexts()
    signs, same = Prediction(-one, -one * UNIT - off).contexts()
    assert signs.tolist() == [-1] * len(off)
    assert up.tolist() == same.tolist()
    assert [int(c) for c in up] == [9, 9, 10, 11, 12, 13, 13]
    _, down = Prediction(one, one * UNIT - off).contexts()
    assert min(down) == len(FRACTIONS) + 1
    assert max(up) == CONTEXTS - 1


def test_scales_and_activity():
    # One table in which the mean magnitude is a half, and one in which it is about 4.
    cdf = np.array([[0, 16384, 49152, 65535, 65536], [0, 32767, 65534, 65535, 65536]], np.int32)
    tables = EntropyTables(cdf, np.array([5, 5], np.int32), np.array([-1, 4], np.int32))
    scales = Scales(tables, np.array([0, 0, 1], np.uint8))
    assert scales.activity(0) == 0
    # Moves as large as the scales together (0.5 + 0.5 + 4.5) are an activity of 1, which is class 12.
    assert scales.activity(5) == scales.activity(6) == 12
    assert scales.activity(11) == 14  # twice that is two half octaves more
    assert scales.activity(10**6) == ACTIVITIES - 1
    # At an activity of 1 the spread is the scale itself: 2**-1, and 2**2 or a half octave more.
    assert scales.spreads(12).tolist()[:2] == [16, 16]
    assert scales.spreads(12)[2] in (22, 23)
    assert (scales.spreads(14) == np.minimum(scales.spreads(12) + 2, SPREADS - 1)).all()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_follow_what_was_counted(video_bundle):
    tables = video_bundle.temporal_tables()
    assert len(tables) == TABLES
    spread = np.array([np.diff(row[:size]).max() for row, size in zip(tables.cdf, tables.sizes, strict=True)])
    by_spread = spread.reshape(SPREADS, CONTEXTS).mean(1)
    assert by_spread[0] > 65_000  # what is not expected to move is all but certain
    assert by_spread[-1] < 25_000


def test_nothing_counted_is_refused():
    with pytest.raises(ValueError, match="no symbols"):
        MoveCounts().freeze()


def test_other_tables_are_refused(video_bundle):
    tables = video_bundle.temporal_tables()
    fewer = EntropyTables(tables.cdf[:-1], tables.sizes[:-1], tables.offsets[:-1])
    with pytest.raises(BundleError, match=f"this version knows {TABLES}"):
        TemporalTables(fewer)
    damaged = {**video_bundle.tensors, "temporal/cdf": video_bundle.tensors["temporal/cdf"][:-1]}
    with pytest.raises(BundleError, match="do not lie in"):
        replace(video_bundle, tensors=damaged).check()


def test_tables_survive_saving_and_change_the_fingerprint(video_bundle, small_bundle, tmp_path):
    video_bundle.save(tmp_path)
    loaded = Bundle.load(tmp_path)
    assert loaded.fingerprint == video_bundle.fingerprint != small_bundle.fingerprint
    assert np.array_equal(loaded.temporal_tables().cdf, video_bundle.temporal_tables().cdf)
    assert small_bundle.temporal_tables() is None


def test_moving_pictures_are_the_same_for_a_seed_and_move():
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((240, 160))
    moved = []
    for seed in range(8):
        frames = list(moving(photograph, photograph, 32, 4, seed))
        again = list(moving(photograph, photograph, 32, 4, seed))
        assert all(f.shape == (32, 32, 3) and f.dtype == np.uint8 for f in frames)
        assert all(np.array_equal(a, b) for a, b in zip(frames, again, strict=True))
        moved.append(np.abs(frames[-1].astype(int) - frames[0]).mean())
    assert max(moved) > 10 * min(moved)


# --- golden ----------------------------------------------------------------------------------------------------------


def test_golden_predicted_packets():
    """A predicted packet decodes for ever, from its reference, to these symbols; `write_golden.py` wrote it."""
    tables = np.load(DATA / "temporal-tables.npz", allow_pickle=False)
    golden = Bundle.load(DATA / "golden_bundle")
    codec = Codec(with_tables(golden, EntropyTables.of_flat(tables["cdf"], tables["sizes"], tables["offsets"])))
    reference = None
    for name in ("key", "predicted", "coarser"):
        packet = Packet.from_bytes((DATA / f"packet-v3-{name}.bin").read_bytes())
        assert (packet.back > 0) == (name != "key")
        symbols, reference = codec.decompress_video(packet, reference)
        expected = np.load(DATA / f"packet-v3-{name}.npy", allow_pickle=False)
        assert np.array_equal(symbols, expected)
