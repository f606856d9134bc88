"""Packets: golden files, round trips, truncation and damage."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from headrace.models.bitstream import MAX_SLICE_BYTES, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.exceptions import BitstreamError, LimitError, OperatingPointError
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parents[1] / "data"
packets = st.builds(
    Packet,
    operating_point=st.integers(0, 127),
    frame_id=st.integers(0, 2**32 - 1),
    slices=st.lists(st.binary(max_size=300), min_size=1, max_size=5).map(tuple),
    back=st.integers(0, 31),
)


@settings(deadline=None)
@given(packets)
def test_round_trip(packet):
    assert Packet.from_bytes(packet.to_bytes()) == packet


@given(packets)
def test_at_most_24_bytes_besides_the_slices(packet):
    assert len(packet.to_bytes()) - sum(map(len, packet.slices)) <= 24


@pytest.mark.parametrize("back", [0, 31])
def test_at_most_24_bytes_at_the_largest_fields(back):
    packet = Packet(127, 2**32 - 1, (bytes(MAX_SLICE_BYTES), bytes(200), bytes(200), bytes(200), bytes(40000)), back)
    assert len(packet.to_bytes()) - sum(map(len, packet.slices)) == 24


@settings(deadline=None)
@given(packets, st.integers(1, 5))
def test_a_prefix_is_a_packet(packet, count):
    prefix = Packet.from_bytes(packet.prefix(count).to_bytes())
    assert prefix.slices == packet.slices[:count]


@settings(deadline=None, max_examples=40)
@given(packets)
def test_every_truncation_is_refused(packet):
    data = packet.to_bytes()
    for end in range(len(data)):
        with pytest.raises(BitstreamError):
            Packet.from_bytes(data[:end])
    with pytest.raises(BitstreamError):
        Packet.from_bytes(data + b"\0")


@settings(deadline=None, max_examples=40)
@given(packets, st.integers(1, 255))
def test_every_flipped_byte_is_refused(packet, flip):
    data = packet.to_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= flip
        with pytest.raises(BitstreamError):
            Packet.from_bytes(bytes(damaged))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(BitstreamError):
        Packet.from_bytes(data)


@pytest.mark.parametrize(
    "front", [b"\x94\x01\x00\x00\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_declared_sizes_allocate_nothing(front):
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(BitstreamError):
        Packet.from_bytes(front + bytes(100))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_packet_over_the_limit_is_refused():
    with pytest.raises(LimitError, match="200 bytes"):
        Packet.from_bytes(bytes(200), limit=100)


def test_a_key_frame_is_of_the_version_that_every_reader_knows():
    assert Packet(1, 7, (b"x",)).to_bytes()[1] == 2
    predicted = Packet(1, 7, (b"x",), 9)
    assert predicted.to_bytes()[1] == 3
    assert predicted.reference_id == 2**32 - 2  # ids begin again
    assert Packet(1, 7, (b"x",)).reference_id is None


@pytest.mark.parametrize(("version", "count"), [(2, 1 | 4 << 3), (3, 1)])
def test_a_reference_has_to_go_with_the_version(version, count):
    rest = bytes([count]) + b"slice"
    front = b"\x94" + bytes([version, 1, 7]) + b"\xc4" + bytes([4 + len(rest)])
    data = front + zlib.crc32(rest, zlib.crc32(front)).to_bytes(4, "little") + rest
    with pytest.raises(BitstreamError, match=f"version {version} cannot have its reference"):
        Packet.from_bytes(data)


def test_fields_out_of_range_are_refused():
    for packet in (
        Packet(0, 0, (b"",), 32),
        Packet(0, 0, (b"",), -1),
        Packet(128, 0, (b"",)),
        Packet(0, 2**32, (b"",)),
        Packet(0, 0, ()),
        Packet(0, 0, (b"",) * 6),
    ):
        with pytest.raises(BitstreamError):
            packet.to_bytes()
    with pytest.raises(BitstreamError, match="over the limit"):
        Packet(0, 0, (bytes(MAX_SLICE_BYTES + 1), b"")).to_bytes()


# --- with a bundle ---------------------------------------------------------------------------------------------------


def symbols_of(bundle: Bundle, split: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.rint(rng.laplace(0, 2.0, bundle.split(split).latent_shape)).astype(np.int32)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(0, 1000), st.integers(1, 4))
def test_any_prefix_of_slices_decodes(small_bundle, point_id, seed, count):
    codec, point = Codec(small_bundle), small_bundle.operating_point(point_id)
    symbols = symbols_of(small_bundle, point.split, seed)
    ends = small_bundle.split(point.split).slices[point.rate_level]
    received = codec.decompress(codec.compress_symbols(symbols, point, 5).prefix(count))
    order = small_bundle.order(point.split)[: ends[count - 1]]
    expected = np.zeros_like(symbols)
    expected.reshape(-1)[order] = symbols.reshape(-1)[order]
    assert (received == expected).all()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.binary(max_size=120), min_size=1, max_size=5), st.integers(0, 6))
def test_a_well_formed_packet_of_garbage_slices_never_crashes(small_bundle, slices, point_id):
    packet = Packet.from_bytes(Packet(point_id, 1, tuple(slices)).to_bytes())
    try:
        symbols = Codec(small_bundle).decompress(packet)
    except (BitstreamError, OperatingPointError):
        return
    point = small_bundle.operating_point(point_id)
    assert symbols.shape == small_bundle.split(point.split).latent_shape


def test_latents_of_the_wrong_shape_are_refused(small_bundle):
    with pytest.raises(OperatingPointError, match="takes a latent"):
        Codec(small_bundle).compress(np.zeros((1, 2, 3), np.float32), small_bundle.operating_point(1), 0)
    with pytest.raises(OperatingPointError, match="only feature points"):
        Codec(small_bundle).compress(np.zeros((1, 2, 3), np.float32), small_bundle.operating_point(0), 0)


def test_a_packet_with_more_slices_than_the_rate_level_is_refused(small_bundle):
    with pytest.raises(BitstreamError, match="has 4 slices, the packet 5"):
        Codec(small_bundle).decompress(Packet(1, 0, (b"",) * 5))


def test_the_entropy_is_what_the_slices_are_close_to(small_bundle):
    codec, point = Codec(small_bundle), small_bundle.operating_point(1)
    symbols = symbols_of(small_bundle, "a")
    size = sum(map(len, codec.compress_symbols(symbols, point, 0).slices))
    assert codec.entropy_bits(symbols, point) / 8 < size < codec.entropy_bits(symbols, point) / 8 + 8


def test_golden_packets():
    """Packets of this version decode for ever, to these symbols; `write_golden.py` wrote them."""
    names = sorted(p.name for p in DATA.glob("packet-v2-*.bin"))
    assert names == [
        "packet-v2-a0.bin",
        "packet-v2-a1.bin",
        "packet-v2-b0.bin",
        "packet-v2-extreme.bin",
        "packet-v2-image.bin",
        "packet-v2-prefix.bin",
    ]
    golden = Bundle.load(DATA / "golden_bundle")
    codec = Codec(golden)
    for name in names:
        data = (DATA / name).read_bytes()
        packet = Packet.from_bytes(data)
        assert packet.to_bytes() == data
        if name.endswith("image.bin"):
            assert packet.slices[0][:4] == b"RIFF"
            continue
        expected = np.load(DATA / name.replace(".bin", ".npy"), allow_pickle=False)
        assert (codec.decompress(packet) == expected).all()
        if name.endswith("prefix.bin"):
            assert len(packet.slices) == 2
            continue
        again = codec.compress_symbols(expected, golden.operating_point(packet.operating_point), packet.frame_id)
        assert again.to_bytes() == data


def test_packets_of_the_first_version_are_refused_by_name():
    with pytest.raises(BitstreamError, match="packet version 1 is not 2"):
        Packet.from_bytes(b"\x94\x01" + Packet(0, 0, (b"",)).to_bytes()[2:])
