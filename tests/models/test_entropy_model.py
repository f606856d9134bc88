import numpy as np
from headrace.models.entropy_coder import SliceCoder
from headrace.models.entropy_model import frozen_tables


def test_tables_fit_what_they_were_made_from():
    """Within 3 % of the symbols' own empirical entropy: the mixture and 16 bits cost little."""
    rng = np.random.default_rng(0)
    symbols = np.rint(rng.laplace(0, 1.5, (100, 3, 7, 7))).astype(np.int32)
    tables = frozen_tables(symbols)
    for channel in range(3):
        values = symbols[:, channel]
        counts = np.unique(values, return_counts=True)[1] / values.size
        entropy = -(counts * np.log2(counts)).sum() * values.size
        assert entropy < tables.bits(values, np.full_like(values, channel)) < 1.03 * entropy


def test_a_channel_that_was_always_zero_still_codes_anything():
    tables = frozen_tables(np.zeros((100, 2, 3, 3), np.int32))
    coder = SliceCoder(tables, 0, 2, 9)
    symbols = np.arange(-9, 9, dtype=np.int32).reshape(2, 3, 3)
    assert (coder.decode(coder.encode(symbols)).reshape(2, 3, 3) == symbols).all()


def test_wild_channels_keep_a_bounded_table():
    tables = frozen_tables((np.arange(400, dtype=np.int32) * 10000).reshape(100, 1, 2, 2))
    assert tables.cdf.shape[1] < 5000
