import numpy as np
from headrace.models.quantiser import SYMBOL_LIMIT, dequantise, quantise


def test_rounds_to_nearest_even_after_the_gain():
    latent = np.array([[[0.24, 0.26, -0.26]], [[2.5, 3.5, -2.5]]], np.float32)
    symbols = quantise(latent, np.array([2.0, 1.0], np.float32))
    assert symbols.dtype == np.int32
    assert symbols.tolist() == [[[0, 1, -1]], [[2, 4, -2]]]


def test_error_is_at_most_half_a_step():
    rng = np.random.default_rng(1)
    latent = rng.normal(0, 30, (6, 5, 4)).astype(np.float32)
    gain = rng.uniform(0.1, 3, 6).astype(np.float32)
    error = np.abs(dequantise(quantise(latent, gain), gain) - latent)
    assert (error <= 0.5 / gain[:, None, None] + 1e-4).all()


def test_a_broken_head_gives_bounded_integers():
    latent = np.array([[[np.nan, np.inf, -np.inf, 1e30]]], np.float32)
    assert quantise(latent, np.ones(1, np.float32)).tolist() == [[[0, SYMBOL_LIMIT, -SYMBOL_LIMIT, SYMBOL_LIMIT]]]
