from pathlib import Path

import numpy as np
import pytest
from headrace.models.bundle import BackboneSpec, Bundle, Preprocessing, SplitSpec
from headrace.models.entropy_model import TableCounts, scale_classes
from headrace.models.operating_point import Kind, OperatingPoint
from PIL import Image


def make_bundle(seed: int = 7) -> Bundle:
    """A small bundle with two splits of two rate levels, its tables fitted on Laplace noise."""
    rng = np.random.default_rng(seed)
    splits, tensors, points = [], {}, [OperatingPoint(id=0, kind=Kind.LOCAL, accuracy=1.0)]
    for name, (c, h, w), k in (("a", (6, 5, 4), 6), ("b", (9, 2, 3), 8)):
        size = k * h * w
        order = rng.permutation(size)[: size - 5].astype(np.int32)
        scales = np.linspace(4, 0.1, len(order))
        slices = []
        counts, classes = TableCounts(), []
        for level, coded in enumerate((len(order), len(order) - 11)):
            symbols = np.rint(rng.laplace(0, scales[:coded] / (level + 1), (40, coded))).astype(np.int32)
            classes.append(scale_classes(symbols))
            counts.add(symbols, classes[-1])
            slices.append((coded // 8, coded // 4, coded // 2, coded))
            points.append(OperatingPoint(id=len(points), kind=Kind.FEATURE, split=name, rate_level=level))
        tables, where = counts.freeze()
        rows, columns = np.linalg.qr(rng.normal(size=(h, h)))[0], np.linalg.qr(rng.normal(size=(w, w)))[0]
        part = {
            "gains": np.stack([np.full(k, 2.0), np.full(k, 1.0)]),
            "mean": rng.normal(size=(c, h, w)),
            "encoder": rng.normal(size=(k, c)),
            "decoder": rng.normal(size=(c, k)),
            "rows": np.stack([rows, rows.T]),
            "columns": np.stack([columns, columns.T]),
            "weights": rng.uniform(0.5, 2, (k, h, w)),
        }
        tensors |= {f"{name}/{key}": value.astype(np.float32) for key, value in part.items()}
        tensors |= {f"{name}/order": order, f"{name}/cdf": tables.cdf}
        tensors |= {f"{name}/sizes": tables.sizes, f"{name}/offsets": tables.offsets}
        tensors |= {f"{name}/{level}/indexes": where[each] for level, each in enumerate(classes)}
        splits.append(SplitSpec(name, (c, h, w), k, tuple(slices)))
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


@pytest.fixture(scope="session")
def noise_pictures(tmp_path_factory) -> Path:
    """110 small pictures: blurred noise, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    for i in range(110):
        noise = rng.integers(0, 256, (6 + i % 3, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 64), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    return folder
