"""Codecs for features from papers: real bytes that decode to what the encoder meant, and nothing wilder than that."""

import json
import random

import numpy as np
import pytest
import skimage.data
import torch
from headrace.bench.training_free import cohen2021, quantise_only, slicer, sparse_rans
from headrace.bench.training_free.run import FAMILIES, TrainingFree
from headrace.bench.training_free.static_coder import StaticDecoder, StaticEncoder, StaticTables, counted_tables
from headrace.cli import app
from headrace.models.bundle import Bundle
from headrace.models.command_line import COMMITTED
from headrace.models.exceptions import DataError
from headrace.models.measure import find_pictures, pixel_batches
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

SHAPE = (6, 8, 7)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Heavy-tailed, with a mean and a width for each channel, as behind a linear bottleneck."""
    rng = np.random.default_rng(3)
    width = np.linspace(1, 4, SHAPE[0])[:, None, None]
    return (rng.laplace(0, width, (40, *SHAPE)) + width / 3).astype(np.float32)


@pytest.fixture(scope="module")
def codecs(features):
    return {family: calibrate(features) for family, calibrate in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_codec_has_six_or_more_settings_that_span_a_curve(codecs, features, family):
    assert len(codecs[family]) >= 6
    assert len({c.setting for c in codecs[family]}) == len(codecs[family])
    sizes = [np.mean([len(c.encode(f)) for f in features[:10]]) for c in codecs[family]]
    assert max(sizes) > 1.7 * min(sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bytes_are_less_error(codecs, features, family):
    """Between the cheapest and the dearest setting, on features that were not calibrated on."""
    rng = np.random.default_rng(4)
    unseen = (features[:12] + rng.normal(0, 0.1, (12, *SHAPE))).astype(np.float32)
    points = []
    for codec in codecs[family]:
        coded = [codec.encode(f) for f in unseen]
        received = np.stack([codec.decode(data) for data in coded])
        assert received.shape == unseen.shape
        assert received.dtype == np.float32
        points.append((sum(map(len, coded)), float(((received - unseen) ** 2).mean())))
    assert min(points)[1] > 1.3 * max(points)[1]
    # All of them are better than sending nothing and showing the mean.
    assert max(points)[1] < 0.5 * float(unseen.var())


def test_streams_stand_for_themselves(codecs, features):
    """What is decoded is a function of the bytes: coding it again changes nothing for plain quantisers."""
    for codec in codecs["quantise_only"] + codecs["cohen2021"]:
        received = codec.decode(codec.encode(features[0]))
        if "entropy" not in codec.setting:
            assert np.allclose(codec.decode(codec.encode(received)), received, atol=1e-4)


def test_quantise_only_is_wrong_by_half_a_step_at_most(features):
    codec = quantise_only.QuantiseOnly(features, 1.5)
    error = np.abs(codec.decode(codec.encode(features[1])) - features[1])
    assert error.max() <= 0.75 * features.std() * 1.001


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_the_uniform_range_is_the_one_of_least_error(features, levels):
    quantiser = cohen2021.uniform_quantiser(features, levels)
    assert np.allclose(np.diff(quantiser.levels), np.diff(quantiser.levels)[0])

    def error(scale: float) -> float:
        other = cohen2021.Quantiser(quantiser.levels * scale, quantiser.price, 0.0)
        return float(((features - other.levels[other(features)]) ** 2).mean())

    assert error(1.0) < min(error(0.6), error(1.6))
    assert features.min() < quantiser.levels[0] < quantiser.levels[-1] < features.max()


def test_entropy_constraint_trades_error_for_bits(features):
    free, dear = (cohen2021.entropy_constrained_quantiser(features, 3, trade) for trade in (0.0, 0.5))

    def entropy(quantiser: cohen2021.Quantiser) -> float:
        share = np.bincount(quantiser(features).reshape(-1), minlength=3) / features.size
        return float(-(share * np.log2(np.maximum(share, 1e-12))).sum())

    assert entropy(dear) < 0.8 * entropy(free)
    assert (np.diff(dear.levels) > 0).all()


def test_unary_bins_cost_what_the_channels_levels_do(features):
    """Contexts a channel and bin: the stream is as long as the levels' entropy under the channel's own shares."""
    quantiser = cohen2021.uniform_quantiser(features, 4)
    codec = cohen2021.Cohen2021(features, quantiser, "x")
    index = quantiser(features).transpose(1, 0, 2, 3).reshape(SHAPE[0], -1)
    bits = 0.0
    for channel in index:
        share = np.bincount(channel, minlength=4) / channel.size
        bits -= float(np.log2(share[channel]).sum())
    coded = sum(len(codec.encode(f)) for f in features)
    assert bits / 8 < coded < bits / 8 + 8 * len(features)


def test_slicer_keeps_exactly_k_and_the_largest(features):
    how = slicer.Setting(kept=0.25, blocks=2, budget=0.01)
    codec = slicer.Slicer(features, how)
    received = codec.decode(codec.encode(features[2]))
    kept = received != 0
    assert kept.sum() == round(0.25 * np.prod(SHAPE))
    assert np.abs(features[2][kept]).min() >= np.abs(features[2][~kept]).max()
    assert (np.sign(received[kept]) == np.sign(features[2][kept])).all()
    error = ((received - features[2])[kept] ** 2).sum()
    assert error <= how.budget * 1.05 * (features[2][kept] ** 2).sum()


def test_slicer_weighs_negative_ones_by_the_asymmetry(features):
    codecs = [slicer.Slicer(features, slicer.Setting(0.2, 2, 0.1, asymmetry)) for asymmetry in (0.5, 2.0)]
    few, many = (int((c.decode(c.encode(features[0])) < 0).sum()) for c in codecs)
    assert few < many


def test_sparse_rans_restores_its_own_quantisation(features):
    for codec in sparse_rans.calibrate(features):
        received = codec.decode(codec.encode(features[3]))
        width = (features[3].max() - features[3].min()) / (int(codec.setting.split()[0]) - 1)
        # Half a level, and as much again at the ends where the zero point was rounded.
        assert np.abs(received - features[3]).max() <= 1.01 * width


def test_sparse_rans_chooses_long_rows_for_what_is_nearly_empty(features):
    empty = np.where(np.abs(features) > 16, features, 0).astype(np.float32)
    columns = int(sparse_rans.SparseRans(empty, 8).setting.split()[-1])
    assert columns > int(sparse_rans.SparseRans(features, 16).setting.split()[-1])


def test_tables_leave_nothing_impossible_and_streams_decode_in_steps():
    tables = StaticTables.of(counted_tables(np.array([[1000, 0, 0], [0, 0, 5]])))
    tables += StaticTables.of(counted_tables(np.array([[1, 1]])))
    first, second = np.array([0, 1, 2, 2], np.int32), np.array([1, 0, 1], np.int32)
    under, over = np.array([0, 0, 0, 1], np.int32), np.full(3, 2, np.int32)
    encoder = StaticEncoder(tables)
    encoder.put(first, under)
    encoder.put(second, over)
    source = StaticDecoder(tables, encoder.flush())
    assert source.take(under).tolist() == first.tolist()
    assert source.take(over).tolist() == second.tolist()
    assert StaticEncoder(tables).flush() == b""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Labelled ones, and some to calibrate on: crops of scikit-image's cat and coffee."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("labelled", "calibration"):
        (folder / name).mkdir()
    for wnid, name in (("n02124075", "chelsea"), ("n07920052", "coffee")):
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture.save(folder / "labelled" / f"{wnid}_{name}.png")
        for left in (0, 40, 80):
            picture.crop((left, left, left + 220, left + 220)).save(folder / "calibration" / f"{name}{left}.png")
    return folder


def test_eval_rd_puts_the_baselines_beside_our_points(photographs, tmp_path):
    arguments = ["--data", str(photographs / "labelled"), "--json", str(tmp_path / "out.json"), "--at", "blocks.5"]
    arguments += ["--baselines", "training-free", "--calibration", str(photographs / "calibration")]
    done = CliRunner().invoke(app, ["eval", "rd", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out.json").read_text())
    families = set(FAMILIES)
    assert families == {"cohen2021", "slicer", "sparse_rans", "quantise_only"}
    assert families | {"deep", "webp", "jpeg", "avif"} <= set(result["at"]["0.95"])
    assert set(result["at_split"]["blocks.5"]["0.95"]) == families | {"deep"}
    for family in families:
        points = [p for p in result["points"] if p["family"] == family]
        assert len(points) >= 6
        assert {p["split"] for p in points} == {"blocks.5"}
        reaching = [p["bytes"] for p in points if p["relative"] >= 0.95]
        assert result["at"]["0.95"][family] == (min(reaching) if reaching else None)
        assert result["at_split"]["blocks.5"]["0.95"][family] == result["at"]["0.95"][family]
    # The finest settings leave a cat a cat.
    assert any(p["relative"] == 1.0 for p in result["points"] if p["family"] == "quantise_only")


def test_baselines_are_calibrated_on_the_photographs_that_a_split_takes(photographs):
    """The same shuffle of the same folder: `headrace split` with the bundle's seed."""
    bundle = Bundle.load(COMMITTED)
    seen = []

    class Watched:
        preprocessing = bundle.preprocessing

        def at(self, split):
            return self, split

        def head(self, split):
            return lambda pixels: seen.append(pixels.float().permute(0, 3, 1, 2)) or (seen[-1][:, :, :8, :8] / 64,)

        def tail(self, split):
            return lambda features: (features.mean((2, 3)),)

    run = TrainingFree(photographs / "calibration", photographs=4, at=("any",))
    paths = find_pictures(photographs / "labelled")
    assert run.splits(bundle) == ("any",)
    found = run.measure(Watched(), bundle, "any", paths, Progress(disable=True))
    shuffled = find_pictures(photographs / "calibration")
    random.Random(bundle.provenance["seed"]).shuffle(shuffled)
    expected = torch.cat(list(pixel_batches(shuffled[:4], bundle.preprocessing))).float().permute(0, 3, 1, 2)
    assert torch.equal(seen[0], expected)
    assert {o.split for o in found} == {"any"}
    assert all(len(o.coded_bytes) == len(o.answers) == len(paths) for o in found)


def test_baselines_without_photographs_are_refused_with_a_remedy(photographs):
    done = CliRunner().invoke(app, ["eval", "rd", "--data", str(photographs), "--baselines", "training-free"])
    assert isinstance(done.exception, DataError)
    assert "--calibration" in str(done.exception)
