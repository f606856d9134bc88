"""Kernels of the server's learned networks in a byte a weight."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headrace.models import bundle as bundles
from headrace.models.bundle import Bundle
from headrace.models.exceptions import BundleError
from headrace.models.learning.cut import learned_cuts
from headrace.models.learning.eight_bits import STEP, as_floats, in_eight_bits


@pytest.fixture
def kernels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    wide = (rng.normal(size=(64, 32, 3, 3)) * rng.uniform(1e-3, 10, (64, 1, 1, 1))).astype(np.float16)
    wide[5] = 0
    return {"a/weight": wide, "a/bias": rng.normal(size=5000).astype(np.float16), "b/weight": wide[:2]}


def test_a_row_is_off_by_half_a_step_at_most(kernels):
    stored = in_eight_bits(kernels)
    assert stored["a/weight"].dtype == np.int8 and stored["a/weight" + STEP].shape == (64,)
    read = as_floats(stored)
    assert set(read) == set(kernels)
    off = np.abs(read["a/weight"] - kernels["a/weight"].astype(np.float32)).reshape(64, -1).max(1)
    steps = stored["a/weight" + STEP].astype(np.float32)
    # The step itself has half precision, by which the largest weight, of 127 steps, may be off too.
    assert (off <= steps * (0.5 + 127 * 2**-11) + 1e-9).all()
    assert not read["a/weight"][5].any()


def test_vectors_and_small_kernels_stay_as_they_are(kernels):
    stored = in_eight_bits(kernels)
    for name in ("a/bias", "b/weight"):
        np.testing.assert_array_equal(stored[name], kernels[name])


def test_what_is_read_is_stored_again_as_it_is(kernels):
    stored = in_eight_bits(kernels)
    again = in_eight_bits({k: v.astype(np.float16) for k, v in as_floats(stored).items()})
    np.testing.assert_array_equal(again["a/weight"], stored["a/weight"])


def test_the_shipped_detector_is_in_eight_bits_and_damage_is_told():
    bundle = Bundle.load(Path(bundles.__file__).parent / "bundles" / "yolov2_tiny")
    stepped = [name for name, array in bundle.learned.items() if array.dtype == np.int8]
    assert stepped and all(name + STEP in bundle.learned for name in stepped)
    cut = learned_cuts(bundle)["slim-100"]
    weight = cut.synthesis.state_dict()["layers.2.inner.2.weight"]
    step = bundle.learned["slim/synthesis/layers/2/inner/2/weight" + STEP]
    whole = weight.numpy().reshape(len(step), -1) / step.astype(np.float32)[:, None]
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)
    without = {name: array for name, array in bundle.learned.items() if name != stepped[0] + STEP}
    with pytest.raises(BundleError, match="lacks the steps of its eight bits"):
        replace(bundle, learned=without).check()
