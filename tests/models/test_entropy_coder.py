import contextlib
import subprocess
import sys

import numpy as np
import pytest
from headrace.models.entropy_coder import EntropyTables, SliceCoder
from headrace.models.entropy_model import frozen_tables
from headrace.models.exceptions import BitstreamError, BundleError
from headrace.models.quantiser import SYMBOL_LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st


def laplace_tables(channels: int, scale: float = 2.0) -> EntropyTables:
    rng = np.random.default_rng(channels)
    return frozen_tables(np.rint(rng.laplace(0, scale, (50, channels, 4, 4))).astype(np.int32))


@st.composite
def coded_slices(draw):
    channels, height, width = (draw(st.integers(1, 6)) for _ in range(3))
    values = st.one_of(
        st.integers(-3, 3), st.integers(-SYMBOL_LIMIT, SYMBOL_LIMIT), st.sampled_from([-SYMBOL_LIMIT, SYMBOL_LIMIT])
    )
    count = channels * height * width
    flat = draw(st.lists(values, min_size=count, max_size=count))
    return np.array(flat, np.int32).reshape(channels, height, width)


@settings(deadline=None, max_examples=200)
@given(coded_slices(), st.floats(0.05, 20))
def test_every_shape_and_extreme_symbols_come_back(symbols, scale):
    channels, height, width = symbols.shape
    coder = SliceCoder(laplace_tables(channels, scale), 0, channels, height * width)
    assert (coder.decode(coder.encode(symbols)).reshape(symbols.shape) == symbols).all()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_decode_to_something_or_are_refused(data):
    coder = SliceCoder(laplace_tables(5), 0, 5, 9)
    with contextlib.suppress(BitstreamError):
        assert coder.decode(data).shape == (5, 9)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_bytes_that_force_the_longest_escapes_stay_within_the_buffer(data):
    """A table whose escape is nearly certain, and streams of set bits: every symbol announces the most it can."""
    cdf = np.array([[0, 1, 2, 65536]], np.int32)
    coder = SliceCoder(EntropyTables(cdf, np.array([4], np.int32), np.array([0], np.int32)), 0, 1, 64)
    stream = data.draw(st.one_of(st.integers(8, 400).map(lambda n: b"\xff" * n), st.binary(min_size=8, max_size=400)))
    with contextlib.suppress(BitstreamError):
        assert coder.decode(stream).shape == (1, 64)


def test_a_slice_of_zeros_is_empty():
    coder = SliceCoder(laplace_tables(3), 0, 3, 4)
    assert coder.encode(np.zeros((3, 2, 2), np.int32)) == b""
    assert not coder.decode(b"").any()


def test_coded_size_is_close_to_the_tables_own_entropy():
    rng = np.random.default_rng(3)
    symbols = np.rint(rng.laplace(0, 2.0, (8, 14, 14))).astype(np.int32)
    tables = laplace_tables(8)
    index = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None, None], symbols.shape)
    ideal = tables.bits(symbols, index) / 8
    assert ideal < len(SliceCoder(tables, 0, 8, 196).encode(symbols)) < 1.01 * ideal + 8


def test_decodes_what_the_library_itself_coded():
    """The format is CompressAI's: our slice is its stream but for zero bytes at the top of the coder's state."""
    from compressai.ans import RansEncoder

    tables, symbols = laplace_tables(4), np.arange(-8, 8, dtype=np.int32).reshape(4, 2, 2)
    rows = [r[:s].tolist() for r, s in zip(tables.cdf, tables.sizes, strict=True)]
    theirs = RansEncoder().encode_with_indexes(
        symbols.reshape(-1).tolist(),
        np.repeat(np.arange(4), 4).tolist(),
        rows,
        tables.sizes.tolist(),
        tables.offsets.tolist(),
    )
    coder = SliceCoder(tables, 0, 4, 4)
    assert (coder.decode(theirs).reshape(symbols.shape) == symbols).all()
    assert len(theirs) - 3 <= len(coder.encode(symbols)) <= len(theirs)


@pytest.mark.parametrize(
    ("cdf", "sizes"),
    [
        ([[0, 100, 65536, 0]], [4]),
        ([[0, 100, 65535, 0]], [3]),
        ([[1, 100, 65536, 0]], [3]),
        ([[0, 100, 100, 65536]], [4]),
        ([[0, 100, 200, 65536]], [9]),
        ([[0, 100, 200, 65536]], [2]),
    ],
)
def test_tables_that_would_crash_the_coder_are_refused(cdf, sizes):
    with pytest.raises(BundleError, match="entropy table 0"):
        EntropyTables(np.array(cdf, np.int32), np.array(sizes, np.int32), np.zeros(1, np.int32))


def test_the_coder_loads_without_torch():
    code = (
        "import sys; from headrace.models.codec import Codec; from headrace.models.entropy_coder import load_rans; "
        "load_rans(); sys.exit('torch' in sys.modules or 'compressai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
