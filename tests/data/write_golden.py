"""Writes the golden bundle and packets beside this file; run it only when the format's version changes.

python tests/data/write_golden.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.image_codec import encode_image
from headrace.models.quantiser import SYMBOL_LIMIT

DATA = Path(__file__).parent


def small_bundle() -> Bundle:
    """The bundle of the models' tests."""
    spec = importlib.util.spec_from_file_location("models_conftest", DATA.parent / "models" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bundle: Bundle = module.make_bundle()
    return bundle


def sent(bundle: Bundle, split: str, level: int, slices: int, symbols: np.ndarray) -> np.ndarray:
    """The symbols that a prefix of slices carries, zeros elsewhere."""
    order = bundle.order(split)[: bundle.split(split).slices[level][slices - 1]]
    kept = np.zeros_like(symbols)
    kept.reshape(-1)[order] = symbols.reshape(-1)[order]
    return kept


def main() -> None:
    """Write all of them."""
    bundle = small_bundle()
    bundle.save(DATA / "golden_bundle")
    codec = Codec(bundle)
    rng = np.random.default_rng(11)
    for name, point_id, slices in (("a0", 1, 4), ("a1", 2, 4), ("b0", 3, 4), ("extreme", 1, 4), ("prefix", 3, 2)):
        point = bundle.operating_point(point_id)
        shape = bundle.split(point.split).latent_shape
        symbols = np.rint(rng.laplace(0, 2.0, shape)).astype(np.int32)
        if name == "extreme":
            symbols = rng.choice([-SYMBOL_LIMIT, -1, 0, 1, SYMBOL_LIMIT], shape).astype(np.int32)
        packet = codec.compress_symbols(symbols, point, 70000 + point_id).prefix(slices)
        (DATA / f"packet-v{VERSION}-{name}.bin").write_bytes(packet.to_bytes())
        kept = sent(bundle, point.split, point.rate_level, slices, symbols)
        np.save(DATA / f"packet-v{VERSION}-{name}.npy", kept, allow_pickle=False)
    picture = (np.add.outer(np.arange(16), np.arange(16))[..., None] * [1, 2, 3]).astype(np.uint8)
    image = next(p for p in bundle.operating_points if p.codec == "webp")
    data = Packet(image.id, 3, (encode_image(picture, "webp", image.rate_level),)).to_bytes()
    (DATA / f"packet-v{VERSION}-image.bin").write_bytes(data)


def write_predicted() -> None:
    """A key frame, one predicted from it, and one from that at a coarser rate level; with the tables that they need."""
    bundle = Bundle.load(DATA / "golden_bundle")
    spec = importlib.util.spec_from_file_location("models_temporal", DATA.parent / "models" / "test_temporal.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    video = module.fitted(bundle)
    tables = video.temporal_tables()
    np.savez_compressed(DATA / "temporal-tables.npz", cdf=tables.flat(), sizes=tables.sizes, offsets=tables.offsets)
    codec, reference = Codec(video), None
    latents = module.scene(video, "a", 3, 0.2, 11)
    for at, (name, point_id) in enumerate((("key", 1), ("predicted", 1), ("coarser", 2))):
        point = video.operating_point(point_id)
        coded = codec.compress_video(codec.quantise(latents[at], point), point, 70000 + 3 * at, reference, 3)
        symbols, _ = codec.decompress_video(coded.packet, reference)
        reference = coded.reference
        (DATA / f"packet-v3-{name}.bin").write_bytes(coded.packet.to_bytes())
        np.save(DATA / f"packet-v3-{name}.npy", symbols, allow_pickle=False)


if __name__ == "__main__":
    main()
    write_predicted()
