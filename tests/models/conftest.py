import numpy as np
import pytest
from headrace.models.bundle import BackboneSpec, Bundle, Preprocessing, SplitSpec
from headrace.models.entropy_model import frozen_tables
from headrace.models.operating_point import Kind, OperatingPoint


def make_bundle(seed: int = 7) -> Bundle:
    """A small bundle with two splits of two rate levels, its tables fitted on Laplace noise."""
    rng = np.random.default_rng(seed)
    splits, tensors, points = [], {}, [OperatingPoint(id=0, kind=Kind.LOCAL, accuracy=1.0)]
    for name, (c, h, w), k in (("a", (6, 5, 4), 6), ("b", (9, 2, 3), 8)):
        slices = ((2, 4, 5, k), (1, 2, 3, k - 1))
        for level, ends in enumerate(slices):
            noise = rng.laplace(0, np.linspace(4, 0.3, k)[:, None, None] / (level + 1), (40, k, h, w))
            tables = frozen_tables(np.rint(noise).astype(np.int32)[:, : ends[-1]])
            tensors[f"{name}/{level}/cdf"] = tables.cdf
            tensors[f"{name}/{level}/sizes"] = tables.sizes
            tensors[f"{name}/{level}/offsets"] = tables.offsets
            points.append(OperatingPoint(id=len(points), kind=Kind.FEATURE, split=name, rate_level=level))
        tensors[f"{name}/gains"] = np.stack([np.full(k, 2.0), np.full(k, 1.0)]).astype(np.float32)
        tensors[f"{name}/mean"] = rng.normal(size=c).astype(np.float32)
        tensors[f"{name}/encoder"] = rng.normal(size=(k, c)).astype(np.float32)
        tensors[f"{name}/decoder"] = rng.normal(size=(c, k)).astype(np.float32)
        splits.append(SplitSpec(name, (c, h, w), k, slices))
    points.append(OperatingPoint(id=len(points), kind=Kind.IMAGE, codec="webp", rate_level=30))
    return Bundle(
        name="small",
        task="classification",
        backbone=BackboneSpec("none", "none", "00"),
        preprocessing=Preprocessing(16, 16, 127.0, 128.0),
        labels=("x", "y"),
        splits=tuple(splits),
        operating_points=tuple(points),
        tensors=tensors,
    ).check()


@pytest.fixture(scope="session")
def small_bundle() -> Bundle:
    return make_bundle()
