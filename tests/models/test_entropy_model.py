import numpy as np
import pytest
from headrace.models.entropy_coder import SymbolCoder
from headrace.models.entropy_model import MAX_CLASSES, TableCounts, scale_classes


def test_tables_fit_what_they_were_made_from():
    """Within 3 % of the symbols' own empirical entropy: the mixture and 16 bits cost little."""
    rng = np.random.default_rng(0)
    symbols = np.rint(rng.laplace(0, 1.5, (4000, 3))).astype(np.int32)
    counts = TableCounts()
    counts.add(symbols, np.zeros(3, np.uint8))
    tables, where = counts.freeze()
    share = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy = -(share * np.log2(share)).sum() * symbols.size
    bits = tables.bits(symbols, np.full(symbols.shape, where[0])).sum()
    assert 0.995 * entropy < bits < 1.03 * entropy


def test_components_of_a_like_magnitude_share_a_class():
    symbols = np.zeros((100, 5), np.int32)
    symbols[:, 1], symbols[:, 2], symbols[:, 3], symbols[:, 4] = 1, -1, 2, 2**15 - 1
    classes = scale_classes(symbols).tolist()
    assert classes[0] < classes[1] == classes[2] == classes[3] - 4 < classes[4] < MAX_CLASSES
    assert scale_classes(np.full((5, 1), 2**15 - 1, np.int32))[0] < MAX_CLASSES


def test_shared_tables_cost_little_more_than_one_a_component():
    """60 components of 12 scales: within 4 % of the entropy of the distributions that the symbols were drawn from."""
    rng = np.random.default_rng(1)
    scales = np.repeat(np.geomspace(0.2, 8, 12), 5)
    fitted, other = (np.rint(rng.laplace(0, scales, (200, 60))).astype(np.int32) for _ in range(2))
    classes, counts = scale_classes(fitted), TableCounts()
    counts.add(fitted, classes)
    tables, where = counts.freeze()
    assert len(tables) < 60
    bits = tables.bits(other, np.broadcast_to(where[classes], other.shape)).sum()
    grid = np.arange(-200, 201)
    edges = np.concatenate((grid - 0.5, [200.5]))[:, None] / scales
    cumulative = np.where(edges < 0, 0.5 * np.exp(-np.abs(edges)), 1 - 0.5 * np.exp(-np.abs(edges)))
    ideal = -np.log2(np.diff(cumulative, axis=0)[other + 200, np.arange(60)]).sum()
    assert bits < 1.04 * ideal


def test_tables_are_symmetric():
    counts = TableCounts()
    counts.add(np.full((50, 1), 3, np.int32), np.zeros(1, np.uint8))
    tables, _ = counts.freeze()
    assert np.ptp(tables.bits(np.array([3, -3], np.int32), np.zeros(2, np.int32))) < 1e-2


def test_a_component_that_was_always_zero_still_codes_anything():
    counts = TableCounts()
    counts.add(np.zeros((100, 18), np.int32), scale_classes(np.zeros((100, 18), np.int32)))
    tables, where = counts.freeze()
    coder = SymbolCoder(tables, where[scale_classes(np.zeros((100, 18), np.int32))], (2, 18))
    symbols = np.arange(-9, 9, dtype=np.int32)
    assert (coder.decode(coder.encode(symbols)) == symbols).all()


def test_wild_components_keep_a_bounded_table():
    counts = TableCounts()
    wild = (np.arange(400, dtype=np.int32) * 80).reshape(100, 4)
    counts.add(wild, scale_classes(wild))
    tables, where = counts.freeze()
    assert tables.cdf.shape[1] < 5000
    coder = SymbolCoder(tables, where[scale_classes(wild)], (1, 2, 3, 4))
    assert all((coder.decode(coder.encode(row)) == row).all() for row in wild)


@pytest.mark.parametrize("spread", [0.01, 1, 100, 500, 2000, 30000])
def test_tables_are_distributions_however_wide(spread):
    rng = np.random.default_rng(2)
    counts = TableCounts()
    counts.add(np.rint(rng.uniform(-spread, spread, (3000, 1))).astype(np.int32), np.zeros(1, np.uint8))
    tables, _ = counts.freeze()
    assert tables.bits(np.array([0], np.int32), np.array([0]))[0] <= 16


def test_nothing_counted_is_refused():
    with pytest.raises(ValueError, match="no symbols"):
        TableCounts().freeze()


def test_symbols_that_are_all_far_outside_escape():
    symbols = np.full((20, 4), 10**6, np.int32)
    classes = scale_classes(symbols)
    counts = TableCounts()
    counts.add(symbols, classes)
    tables, where = counts.freeze()
    coder = SymbolCoder(tables, where[classes], (1, 2, 3, 4))
    assert tables.cdf.shape[1] < 10
    assert (coder.decode(coder.encode(symbols[0])) == symbols[0]).all()
