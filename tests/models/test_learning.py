"""Learn a light encoder for a small random backbone, kill it, cut its bundle with it, and send frames through it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import LEARNED, Bundle
from headrace.models.closed_form import fisher_gradients
from headrace.models.codec import Codec
from headrace.models.edge_half import load_edge_half
from headrace.models.exceptions import BundleError, DataError
from headrace.models.export import export_edge_half
from headrace.models.learning.assemble import assemble, split_names, without
from headrace.models.learning.course import Lightening
from headrace.models.learning.cut import learned_cuts, tensors_of
from headrace.models.learning.lighten import lighten
from headrace.models.learning.metric import Nats
from headrace.models.learning.plan import TrainPlan
from headrace.models.learning.slimmable import SlimmableEncoder
from headrace.models.learning.synthesis import Synthesis, SynthesisShape
from headrace.models.learning.team import ALONE
from headrace.models.learning.train import Learned, train
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.operating_point import Kind
from headrace.models.split import fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone, write_weights
from headrace.models.zoo.sources import Source
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import load_tails

BACKBONE = Source("timm/test_resnet", seed=3, size=64)


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> list[Path]:
    """See `noise_pictures`."""
    return find_pictures(noise_pictures)


@pytest.fixture(scope="module", autouse=True)
def fitted():
    """The metric from few photographs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.learning.train.FITTED", 60)
        yield


@pytest.fixture(scope="module")
def base(photographs) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(load_backbone(BACKBONE), ("layer2",), photographs[:60], photographs[60:68])


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> TrainPlan:
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    file.write_text((Path(__file__).parent / "slim_plan.toml").read_text())
    return TrainPlan.load(file)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def learned(base, plan, photographs, work) -> Learned:
    return train(backbone_of(base), plan, photographs, work, ALONE)


@pytest.fixture(scope="module")
def bundle(base, plan, photographs, learned) -> Bundle:
    return assemble(backbone_of(base), base, plan, learned, photographs[:60], photographs[60:68])


def test_training_makes_the_loss_smaller(base, plan, photographs, learned):
    """What 250 steps gave disturbs the answer less, by the metric, than the mean picture would, at every width."""
    backbone = backbone_of(base)
    pixels = torch.from_numpy(np.stack([load_pixels(p, backbone.preprocessing) for p in photographs]))
    (x,) = backbone.head("input")(pixels)
    nats = Nats(fisher_gradients(backbone.tail("input"), [x[:60]], 0, backbone.task.probe))
    with torch.inference_mode():
        unlearned = float(nats(x - x.mean(0)).mean())
        found = [float(nats(learned.synthesis(learned.encoder(x, w)) - x).mean()) for w in plan.encoder.widths]
    assert found[-1] < 0.8 * unlearned and found[0] < unlearned, (found, unlearned)


def test_killed_and_resumed_ends_as_one_that_was_not(base, plan, photographs, learned, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.descent.SAVE_SECONDS", 0.0)

    class KilledError(Exception):
        pass

    calls = 0
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    # Without new views a step depends on its number alone.
    first, *others = plan.stages
    stages = (first.model_copy(update={"steps": 24}), *others)
    still = plan.model_copy(update={"fresh": 0, "stages": stages})
    with pytest.raises(KilledError):
        train(backbone_of(base), still, photographs, tmp_path / "killed", ALONE)
    resumed = train(backbone_of(base), still, photographs, tmp_path / "killed", ALONE)
    assert calls == 20 + (24 - 19) + 6 + 3  # the nineteen steps before the kill were not made again
    whole = train(backbone_of(base), still, photographs, tmp_path / "whole", ALONE)
    for mine, theirs in zip(resumed.encoder.state_dict().values(), whole.encoder.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_an_encoder_is_made_light(bundle, photographs, tmp_path):
    """All widths at once, which still share their weights; what the server runs stays as it is."""
    wide = next(s for s in bundle.splits if s.learned is not None)
    made = lighten(backbone_of(bundle), bundle, [wide.name], photographs, Lightening(steps=3, batch=4), tmp_path)
    clips = {s.clips for s in made.splits if s.learned is not None}
    assert len(clips) == 1 and None not in clips
    changed = {key for key in made.learned if not np.array_equal(made.learned[key], bundle.learned[key])}
    assert changed and all("/encoder/" in key for key in changed)
    assert set(made.learned) == set(bundle.learned)
    made.save(tmp_path / "made")
    backbone, pixels = backbone_of(Bundle.load(tmp_path / "made")), torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    with torch.inference_mode():
        for split in (s.name for s in made.splits if s.learned is not None):
            assert backbone.head(split)(pixels)[0].shape[1:] == made.split(split).features
    with pytest.raises(DataError, match="hidden channels are for heads of the backbone's own"):
        lighten(backbone_of(bundle), bundle, [wide.name], photographs, Lightening(1, 4, hidden=(8,)), tmp_path)


def test_the_last_stage_left_the_encoder_alone(plan, learned, work):
    from safetensors.torch import load_file

    (folder,) = (p.parent for p in work.glob("*/stage-1.safetensors"))
    before = load_file(folder / "stage-1.safetensors")
    for name, parameter in learned.encoder.named_parameters():
        torch.testing.assert_close(before[f"parameter/encoder.{name}"], parameter.detach(), rtol=0, atol=0)
    changed = [not torch.equal(before[f"parameter/synthesis.{n}"], p) for n, p in learned.synthesis.named_parameters()]
    assert all(changed)


def test_a_plan_with_one_more_stage_goes_on_from_where_it_ended(base, plan, photographs, learned, work):
    more = plan.model_copy(update={"stages": (*plan.stages, plan.stages[-1].model_copy(update={"steps": 1}))})
    began = {file.name: file.stat().st_mtime_ns for file in work.glob("*/stage-*.safetensors")}
    again = train(backbone_of(base), more, photographs, work, ALONE)
    (folder,) = work.iterdir()
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("stage-*.safetensors")}
    assert {name: after[name] for name in began} == began and set(after) - set(began) == {"stage-3.safetensors"}
    for mine, theirs in zip(again.tail.parameters(), learned.tail.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_plan_that_begins_with_the_bundle_goes_on_from_its_networks(bundle, plan, photographs, learned, tmp_path):
    """One step at hardly any rate leaves them what they were, but for half precision."""
    stage = plan.stages[1].model_copy(update={"steps": 1, "rate": 1e-9})
    further = plan.model_copy(update={"begin": "bundle", "stages": (stage,)})
    again = train(backbone_of(bundle), further, photographs, tmp_path, ALONE, begun=bundle.learned)
    assert again.said.startswith("from the bundle's networks 1 steps of 12 views towards answers")
    pixels = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        for width in plan.encoder.widths:
            latent, mine = learned.encoder(pixels, width), again.encoder(pixels, width)
            # The step moved running statistics by a tenth of the way to those of its batch.
            assert float((mine - latent).abs().mean()) < 0.2 * float(latent.abs().mean()), width
    other = train(backbone_of(bundle), further, photographs, tmp_path, ALONE, begun=bundle.learned)
    assert len(list(tmp_path.iterdir())) == 1, "the same networks to begin with are the same run"
    assert torch.equal(other.synthesis.last.weight, again.synthesis.last.weight)


def test_the_rest_of_the_backbone_is_changed_for_all_widths_alike(bundle, learned):
    changes = {k: v for k, v in bundle.learned.items() if k.startswith("slim/tail/")}
    assert changes and any(np.abs(v.astype(np.float32)).max() > 0 for v in changes.values())
    backbone = backbone_of(bundle)
    tails = [backbone.tail(name).modules_in_row[1] for name in ("slim-50", "slim-100")]
    assert tails[0] is tails[1]
    (channels, height, width) = backbone.shape("input")
    x = torch.rand(2, channels, height, width)
    with torch.inference_mode():
        (as_learned,), (changed,), (unchanged,) = (
            learned.tail(x),
            tails[0](x),
            backbone.tail("input")(x),
        )
    assert float((changed - as_learned).abs().max()) < 0.3 * float((unchanged - as_learned).abs().max())


def test_a_width_taken_out_is_the_slimmable_one(plan, learned):
    tensors = tensors_of("slim", learned.encoder, learned.synthesis)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    pixels = torch.randn(2, 3, 64, 64)
    for width in plan.encoder.widths:
        with torch.inference_mode():
            whole = learned.encoder(pixels, width)
        plain = _plain(plan, learned, width)
        with torch.inference_mode():
            alone = plain.encoder(pixels)
            folded = plain.synthesis(whole)
            trained = learned.synthesis(whole)
        scale = float(whole.abs().max())
        assert float((alone - whole).abs().max()) < 2e-2 * scale  # half precision
        assert float((folded - trained).abs().max()) < 2e-2 * float(trained.abs().max())


def _plain(plan, learned, width):
    from headrace.models.bundle import LearnedSpec, SplitSpec
    from headrace.models.learning.cut import synthesis_numbers

    spec = LearnedSpec(
        "slim", width, tuple(plan.encoder.widths[width]), "input", synthesis_numbers(learned.synthesis.shape)
    )
    split = SplitSpec("x", (12, 4, 4), 12, (), learned=spec)

    class Holder:
        name, splits = "b", (split,)
        learned = None

    holder = Holder()
    holder.learned = tensors_of("slim", learned.encoder, learned.synthesis)
    return learned_cuts(holder)["x"]


def test_widths_are_split_points_like_others(bundle, plan, base):
    assert split_names(plan) == ("slim-50", "slim-100")
    for name in split_names(plan):
        points = [p for p in bundle.operating_points if p.split == name]
        assert len(points) >= 6 and all(p.bytes_median > 0 for p in points)
        assert all(len(ends) >= 4 for ends in bundle.split(name).slices)
        sizes = [p.bytes_median for p in points]
        assert sizes == sorted(sizes, reverse=True)
    kept = [p.identity() for p in bundle.operating_points if not p.split.startswith("slim")]
    assert kept == [p.identity() for p in base.operating_points]
    assert bundle.fingerprint != base.fingerprint


def test_frames_go_from_the_exported_graph_to_the_servers_tail(bundle, photographs, tmp_path):
    """Pixels -> ONNX -> packet -> server: the answer is that of the networks in torch, at every width."""
    from headrace.edge.head import Head

    export_edge_half(bundle, tmp_path / "edge")
    edge = load_edge_half(tmp_path / "edge")
    assert edge.fingerprint == bundle.fingerprint
    assert not edge.learned and not (tmp_path / "edge" / LEARNED).exists()
    backbone = backbone_of(bundle)
    head, codec = Head(edge, tmp_path / "edge"), Codec(bundle)
    tails = load_tails([bundle], "cpu", 1)
    for name in ("slim-50", "slim-100"):
        point = next(p for p in bundle.operating_points if p.split == name)
        pixels = load_pixels(photographs[-1], bundle.preprocessing)
        latent = head(name, pixels)
        symbols = codec.decompress(codec.compress(latent, point, 0))
        gain = bundle.gain(name, point.rate_level)
        ((answer,),) = tails[TailKey(bundle.fingerprint, name)]([FeatureInput(symbols, gain)])
        with torch.inference_mode():
            mine = Encoder.of(bundle, name)(*backbone.head(name)(torch.from_numpy(pixels[None])))
            features = Decoder.of(bundle, name)(torch.from_numpy(symbols[None]), torch.from_numpy(gain[None]))
            (scores,) = backbone.tail(name)(features)
        np.testing.assert_allclose(latent, mine[0].numpy(), atol=2e-3 * float(mine.abs().max()))
        assert answer.labels[0].index == int(scores.argmax())


def test_saved_and_loaded_without_or_with_damage(bundle, base, tmp_path):
    bundle.save(tmp_path)
    again = Bundle.load(tmp_path)
    assert again.fingerprint == bundle.fingerprint
    assert set(learned_cuts(again)) == {"slim-50", "slim-100"}
    data = bytearray((tmp_path / LEARNED).read_bytes())
    data[-1] ^= 1
    (tmp_path / LEARNED).write_bytes(data)
    with pytest.raises(BundleError, match=LEARNED):
        Bundle.load(tmp_path)
    (tmp_path / LEARNED).unlink()
    with pytest.raises(BundleError, match=f"slim-50.*{LEARNED}"):
        backbone_of(Bundle.load(tmp_path))
    bare = without(bundle, "slim")
    assert bare.fingerprint == base.fingerprint and not bare.learned
    bare.save(tmp_path)
    assert not (tmp_path / LEARNED).exists()


def test_learning_again_takes_the_place_of_what_was_learned(bundle, plan, photographs, learned):
    again = assemble(backbone_of(bundle), bundle, plan, learned, photographs[:60], photographs[60:68])
    assert [s.name for s in again.splits] == [s.name for s in bundle.splits]
    assert again.learned_digest == bundle.learned_digest and set(again.tensors) == set(bundle.tensors)
    assert [p.identity() for p in again.operating_points] == [p.identity() for p in bundle.operating_points]


def test_a_plan_says_which_rate_levels_and_how_much_of_the_tails_change(bundle, plan, photographs, learned):
    few = plan.model_copy(update={"distortions": {"50": (0.02, 0.05, 0.2)}, "tail_kept": 1.0})
    made = assemble(backbone_of(bundle), bundle, few, learned, photographs[:60], photographs[60:68])
    assert made.split("slim-50").rate_levels == 3
    assert made.split("slim-100").rate_levels == bundle.split("slim-100").rate_levels
    usual, whole = (sum(v.size for k, v in b.learned.items() if "/tail/" in k) for b in (bundle, made))
    assert whole > usual


def test_too_many_operating_points_are_refused(bundle, plan, photographs, learned):
    spare = next(p for p in bundle.operating_points if p.kind is Kind.IMAGE)
    taken = {p.id for p in bundle.operating_points if not p.split.startswith("slim")}
    more = [replace(spare, id=i) for i in range(128) if i not in taken]
    full = without(bundle, "slim")
    full = replace(full, operating_points=(*full.operating_points, *more))
    with pytest.raises(DataError, match="at most 128"):
        assemble(backbone_of(full), full, plan, learned, photographs[:60], photographs[60:68])


def test_a_detector_gets_a_light_encoder(plan, photographs, tmp_path, monkeypatch):
    """A few steps towards features and answers, and packets of what came of it are answered with boxes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
    backbone = load_backbone(Source("own_models:Boxes", "detection", size=32, labels=("a", "b", "c")))
    base = fit(backbone, ("body.1",), photographs[:20], photographs[20:22])
    change = {"anchor": "body.1", "views": 16, "synthesis": ((16, 8, 1), (8, 4, 1))}
    stages = tuple(s.model_copy(update={"steps": 3}) for s in plan.stages)
    few = plan.model_copy(update=change | {"stages": stages})
    learned = train(backbone, few, photographs, tmp_path, ALONE)
    made = assemble(backbone, base, few, learned, photographs[:20], photographs[20:22])
    made.save(tmp_path / "made")
    write_weights(backbone, tmp_path / "made")
    loaded = Bundle.load(tmp_path / "made")
    assert [s.name for s in loaded.splits] == ["body.1", "slim-50", "slim-100"]
    tails = load_tails([loaded], "cpu", 0)
    frame = FeatureInput(np.zeros(loaded.split("slim-50").latent_shape, np.int32), loaded.gain("slim-50", 0))
    ((output,),) = tails[TailKey(loaded.fingerprint, "slim-50")]([frame])
    assert output.tail == "detection" and output.boxes


def test_what_cannot_be_learned_is_said(base, plan, photographs, tmp_path):
    with pytest.raises(DataError, match="too few"):
        train(backbone_of(base), plan, photographs[:20], tmp_path, ALONE)
    odd = plan.model_copy(update={"synthesis": ((8, 4, 1),) * 6})
    with pytest.raises(DataError, match="6 levels"):
        train(backbone_of(base), odd, photographs, tmp_path, ALONE)
    with pytest.raises(DataError, match="cannot be read"):
        TrainPlan.load(tmp_path / "none.toml")


def test_a_synthesis_folds_to_the_same(plan):
    torch.manual_seed(0)
    shape = SynthesisShape(4, (3, 16, 16), 8, ((8, 4, 1), (6, 4, 1)))
    spread = torch.tensor([[1.0, 0, 0], [0.5, 2.0, 0], [0.1, 0.3, 0.7]])
    network = Synthesis(shape, torch.tensor([1.0, -2.0, 3.0]), spread)
    for _ in range(3):  # running statistics other than the first ones
        network(torch.randn(8, 4, 2, 2))
    network.eval()
    latent = torch.randn(2, 4, 2, 2)
    with torch.inference_mode():
        torch.testing.assert_close(network.folded()(latent), network(latent), atol=1e-4, rtol=1e-4)


def test_narrower_widths_compute_less(plan):
    from torch.utils.flop_counter import FlopCounterMode

    encoder = SlimmableEncoder(plan.encoder.widths, plan.encoder.latent).eval()
    spent = []
    for width in plan.encoder.widths:
        with FlopCounterMode(display=False) as counter:
            encoder(torch.zeros(1, 3, 64, 64), width)
        spent.append(counter.get_total_flops())
    assert spent == sorted(spent) and spent[0] < 0.5 * spent[-1]
