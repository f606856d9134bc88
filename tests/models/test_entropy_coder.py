import contextlib
import subprocess
import sys

import numpy as np
import pytest
from headrace.models.entropy_coder import EntropyTables, SymbolCoder
from headrace.models.entropy_model import TableCounts, scale_classes
from headrace.models.exceptions import BitstreamError, BundleError
from headrace.models.quantiser import SYMBOL_LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st


def laplace_tables(count: int, scale: float = 2.0) -> EntropyTables:
    rng = np.random.default_rng(count)
    counts = TableCounts()
    scales = np.linspace(scale, scale / 4, count)
    counts.add(np.rint(rng.laplace(0, scales, (800, count))).astype(np.int32), np.arange(count, dtype=np.uint8))
    return counts.freeze()[0]


def coder_of(symbols: int, slices: int, scale: float = 2.0) -> SymbolCoder:
    """Symbols spread over up to 5 tables, in up to `slices` slices of unequal length."""
    ends = np.unique(np.ceil(symbols * np.linspace(0, 1, slices + 1)[1:] ** 1.5)).astype(int).tolist()
    tables = min(symbols, 5)
    return SymbolCoder(laplace_tables(tables, scale), np.arange(symbols) * tables // symbols, ends)


@st.composite
def some_symbols(draw):
    values = st.one_of(
        st.integers(-3, 3),
        st.just(0),
        st.integers(-SYMBOL_LIMIT, SYMBOL_LIMIT),
        st.sampled_from([-SYMBOL_LIMIT, SYMBOL_LIMIT]),
    )
    return np.array(draw(st.lists(values, min_size=1, max_size=200)), np.int32)


@settings(deadline=None, max_examples=300)
@given(some_symbols(), st.integers(1, 5), st.floats(0.05, 20))
def test_every_prefix_of_extreme_symbols_comes_back(symbols, slices, scale):
    coder = coder_of(len(symbols), slices, scale)
    sections = coder.encode(symbols)
    assert len(sections) == len(coder.ends)
    for count, end in enumerate(coder.ends, 1):
        assert (coder.decode(sections[:count]) == symbols[:end]).all()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_any_bytes_decode_to_something_or_are_refused(sections):
    coder = coder_of(45, 4)
    with contextlib.suppress(BitstreamError):
        assert coder.decode(sections).shape == (coder.ends[len(sections) - 1],)


@settings(deadline=None, max_examples=200)
@given(some_symbols(), st.data())
def test_damaged_sections_decode_to_something_or_are_refused(symbols, data):
    """Bytes cut, added or changed in streams that an encoder wrote."""
    coder = coder_of(len(symbols), 4)
    sections = list(coder.encode(symbols))
    at = data.draw(st.integers(0, len(sections) - 1))
    section = sections[at]
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(section))] * 2)))
    sections[at] = section[:begin] + data.draw(st.binary(max_size=8)) + section[end:]
    with contextlib.suppress(BitstreamError):
        assert coder.decode(sections).shape == (len(symbols),)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_bytes_that_force_the_longest_escapes_stay_within_the_buffer(data):
    """A table whose escape is nearly certain, and streams of set bits: every symbol announces the most it can."""
    cdf = np.array([[0, 1, 2, 65536]], np.int32)
    tables = EntropyTables(cdf, np.array([4], np.int32), np.array([0], np.int32))
    coder = SymbolCoder(tables, np.zeros(64, np.uint8), (64,))
    stream = data.draw(st.one_of(st.integers(8, 400).map(lambda n: b"\xff" * n), st.binary(min_size=8, max_size=400)))
    with contextlib.suppress(BitstreamError):
        assert coder.decode([stream]).shape == (64,)


def test_zeros_are_empty():
    coder = coder_of(12, 4)
    sections = coder.encode(np.zeros(12, np.int32))
    assert sections == (b"",) * 4
    assert not coder.decode(sections).any()


def test_sections_without_their_first_are_refused():
    coder = coder_of(12, 4)
    with pytest.raises(BitstreamError, match="too short"):
        coder.decode([b"", b"\1\2\3\4"])
    with pytest.raises(BitstreamError, match="5 slices cannot be decoded, there are 4"):
        coder.decode([b""] * 5)
    with pytest.raises(BitstreamError, match="0 slices"):
        coder.decode([])


def test_all_slices_together_cost_one_state():
    rng = np.random.default_rng(3)
    symbols = np.rint(rng.laplace(0, np.linspace(2.0, 0.5, 1500))).astype(np.int32)
    tables, indexes = laplace_tables(5), np.arange(1500) * 5 // 1500
    ideal = tables.bits(symbols, indexes).sum() / 8
    whole = SymbolCoder(tables, indexes, (1500,)).encode(symbols)
    cut = SymbolCoder(tables, indexes, (300, 600, 1000, 1500)).encode(symbols)
    assert b"".join(cut) == whole[0]
    assert ideal < len(whole[0]) < 1.01 * ideal + 8
    # A section ends with the word that its last symbol makes the decoder take, so none is longer than it must be.
    prefix = tables.bits(symbols[:600], indexes[:600]).sum() / 8
    assert prefix < len(cut[0]) + len(cut[1]) < prefix + 12


def test_decodes_what_the_library_itself_coded():
    """The format is CompressAI's: our sections are its stream but for zero bytes at the top of the coder's state."""
    from compressai.ans import RansEncoder

    tables, symbols, indexes = laplace_tables(4), np.arange(-8, 8, dtype=np.int32), np.repeat(np.arange(4), 4)
    rows = [r[:s].tolist() for r, s in zip(tables.cdf, tables.sizes, strict=True)]
    theirs = RansEncoder().encode_with_indexes(
        symbols.tolist(), indexes.tolist(), rows, tables.sizes.tolist(), tables.offsets.tolist()
    )
    coder = SymbolCoder(tables, indexes, (16,))
    assert (coder.decode([theirs]) == symbols).all()
    assert len(theirs) - 3 <= len(coder.encode(symbols)[0]) <= len(theirs)


def test_bits_count_escapes():
    tables = laplace_tables(2)
    symbols = np.array([[0, 0], [SYMBOL_LIMIT, -SYMBOL_LIMIT]], np.int32)
    bits = tables.bits(symbols, np.array([[0, 1], [0, 1]]))
    assert bits.shape == (2, 2)
    assert (bits[0] < 3).all()
    assert (bits[1] >= 4 * 5).all()
    coder = SymbolCoder(tables, np.repeat([0, 1], 50), (100,))
    many = np.repeat(symbols[1], 50)
    size = len(coder.encode(many)[0])
    ideal = tables.bits(many, np.repeat([0, 1], 50)).sum() / 8
    assert ideal - 1 < size < 1.01 * ideal + 8


@pytest.mark.parametrize(
    ("indexes", "ends", "message"),
    [
        ([0, 1, 2], (3,), "not among the 2"),
        ([0, -1, 1], (3,), "not among the 2"),
        ([], (0,), "not among the 2"),
        ([0, 1, 1], (2,), "do not divide 3"),
        ([0, 1, 1], (2, 2, 3), "do not divide 3"),
        ([0, 1, 1], (0, 3), "do not divide 3"),
        ([0, 1, 1], (3, 2), "do not divide 3"),
    ],
)
def test_coders_that_do_not_fit_are_refused(indexes, ends, message):
    with pytest.raises(BundleError, match=message):
        SymbolCoder(laplace_tables(2), np.array(indexes, np.int32), ends)


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


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 40), st.integers(1, 400), st.integers(2, 4))
def test_sections_end_where_symbols_coded_by_themselves_say(seed, scale, count, slices):
    """The cuts are worked out from what symbols cost; coding what is behind each cut by itself must say the same."""
    rng = np.random.default_rng(seed)
    fitted = np.rint(rng.laplace(0, scale, (30, count + slices))).astype(np.int32)
    classes, counts = scale_classes(fitted), TableCounts()
    counts.add(fitted, classes)
    tables, where = counts.freeze()
    ends = [*sorted(rng.choice(np.arange(1, count + slices), slices - 1, replace=False).tolist()), count + slices]
    coder = SymbolCoder(tables, where[classes], ends)
    symbols = np.rint(rng.laplace(0, scale * rng.choice([0.3, 1, 50]), count + slices)).astype(np.int32)
    values = [*symbols.tolist(), 0, 0]
    exact = [(len(coder._stream(values, end)) - 8) // 4 for end in ends[:-1]]
    assert coder._words_behind(symbols, values) == exact
    assert np.array_equal(coder.decode(coder.encode(symbols)), symbols)
