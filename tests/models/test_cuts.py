"""Where models can be cut, under which names, into which maps, and that the halves join."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from headrace.models.backbones import EXACT, Backbone, Parts, Scores
from headrace.models.bundle import BackboneSpec, Preprocessing
from headrace.models.cutting.costs import macs_of
from headrace.models.cutting.cuts import MAX_MAPS
from headrace.models.cutting.graph import trace
from headrace.models.cutting.graph_passes import operation_name
from headrace.models.exceptions import BackboneError
from headrace.models.tasks import Classification
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import own_models


def backbone_of(module: nn.Module, size: int = 32) -> Backbone:
    how = Preprocessing(size, size, (127.0, 120.0, 110.0), (60.0, 61.0, 62.0))
    parts = Parts(module, Scores(), Classification(), how, ())
    return Backbone(BackboneSpec("test", "none", "00"), parts)


def randomised(module: nn.Module) -> nn.Module:
    """Normalisations and biases away from the values that hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.uniform_(-0.5, 0.5, generator=generator)
            each.running_var.uniform_(0.5, 2, generator=generator)
            each.weight.data.uniform_(0.5, 2, generator=generator)
            each.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return module


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (own_models.Residual, 32),
        (own_models.Writing, 32),
        (own_models.Windows, 32),
        (own_models.Pyramid, 32),
        (own_models.FixedBatch, 32),
        (lambda: timm.create_model("test_resnet"), 64),
        (lambda: timm.create_model("test_vit", img_size=64), 64),
        (lambda: timm.create_model("test_efficientnet"), 64),
    ],
    ids=["residual", "writing", "channels last", "pyramid", "one frame", "resnet", "tokens", "efficientnet"],
)
def test_head_and_tail_join_at_every_cut(make, size):
    """In batches of 1 and 3, against the module as it was given; the packed map has the shape that is said."""
    torch.manual_seed(0)
    backbone = backbone_of(randomised(make()), size)
    assert len(backbone.cuts) >= 2
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    for cut in backbone.cuts:
        assert backbone.prove(cut.name) <= EXACT
        (features,) = backbone.head(cut.name)(pixels)
        assert features.shape == (2, *backbone.packing(cut.name).packed)
        assert features.dtype == torch.float32
        assert 1 <= len(cut.maps) <= MAX_MAPS
        assert len(cut.maps) > 1 or features.shape[1:] == cut.shapes[0]
    shares = [backbone.costs.macs_share(c) for c in backbone.cuts]
    times = [backbone.costs.time_share(c) for c in backbone.cuts]
    assert shares == sorted(shares)
    assert times == sorted(times)
    assert shares[0] > 0 and shares[-1] < 1


def test_the_proof_notices_halves_of_another_model():
    backbone = backbone_of(own_models.Residual())
    name = backbone.split_points[0]
    assert backbone.prove(name) <= EXACT
    backbone.parts.front.scores = nn.Linear(32, 10).requires_grad_(False)
    backbone._references.clear()
    with pytest.raises(BackboneError, match="differ from the uncut model"):
        backbone.prove(name)


def test_gradients_reach_the_maps_and_nothing_is_written_into_them():
    backbone = backbone_of(own_models.Residual())
    for name in backbone.split_points:
        maps = [m.clone().requires_grad_(True) for m in backbone.head(name)(torch.zeros(2, 32, 32, 3).byte())]
        before = [m.detach().clone() for m in maps]
        (scores,) = backbone.tail(name)(*maps)
        gradients = torch.autograd.grad(scores[:, 0].sum(), maps)
        assert all(g.abs().max() > 0 for g in gradients)
        assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))


def test_parts_between_cuts_make_the_head():
    backbone = backbone_of(timm.create_model("test_resnet"), 64)
    first, second = backbone.split_points[1], backbone.split_points[-2]
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    (whole,) = backbone.head(second)(pixels)
    (parts,) = backbone.between(first, second)(*backbone.head(first)(pixels))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_cuts_are_at_the_ends_of_blocks_and_at_the_narrowest_place_between_layers():
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    backbone = backbone_of(net)
    assert [(c.name, c.shapes) for c in backbone.cuts] == [("2", ((8, 16, 16),)), ("6", ((8, 1, 1),))]
    residual = backbone_of(timm.create_model("test_resnet"), 64)
    ends = {"layer1", "layer2", "layer3", "layer4"}
    assert ends <= set(residual.split_points)
    assert not any(name.count(".") > 1 for name in residual.split_points), "none inside a residual block"


def test_a_block_s_other_names_are_known_and_wrong_ones_get_close_ones():
    backbone = backbone_of(timm.create_model("test_efficientnet"), 64)
    assert backbone.cut("blocks.2").name == "blocks.2"
    alias = backbone.cut("blocks.2").aliases[0]
    assert backbone.cut(alias) is backbone.cut("blocks.2")
    with pytest.raises(BackboneError, match=r"close to it: .*blocks\.2"):
        backbone.cut("blokcs.2")


def test_tokens_and_channels_last_become_maps():
    tokens = backbone_of(timm.create_model("test_vit", img_size=64), 64)
    kinds = {c.name: c.maps[0] for c in tokens.cuts}
    assert kinds["blocks.0"].kind == "tokens"
    assert kinds["blocks.0"].shape == (64, 17, 1)
    assert kinds["patch_embed"].shape == (64, 4, 4), "without a class token they keep their places"
    windows = backbone_of(own_models.Windows())
    inner = [c for c in windows.cuts if c.maps[0].tensor == (8, 8, 12)]
    assert inner and all(c.maps[0].shape == (12, 8, 8) for c in inner)


def test_several_maps_where_one_tensor_is_never_alone():
    backbone = backbone_of(own_models.Pyramid())
    several = [c for c in backbone.cuts if len(c.maps) == 2]
    assert several
    assert several[0].shapes == ((8, 16, 16), (8, 8, 8))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (own_models.Dense, "8 tensors or more are needed at every place"),
        (own_models.one_layer, "there is only one layer"),
        (own_models.Branching, "cannot be traced"),
    ],
)
def test_what_cannot_be_cut_says_why(make, why):
    with pytest.raises(BackboneError, match=why):
        assert backbone_of(make()).cuts


def test_norms_are_folded_into_the_layers_they_follow():
    module = randomised(own_models.Residual()).eval()
    traced = trace(module, torch.randn(2, 3, 32, 32))
    assert not [n for n in traced.module.graph.nodes if "batch_norm" in operation_name(n)]
    example = torch.randn(3, 3, 32, 32)
    (folded,) = traced.segment((traced.input,), traced.outputs)(example)
    assert torch.allclose(folded, module(example), atol=1e-5)


def test_multiply_accumulates_are_those_of_the_formula():
    module = own_models.Residual().eval()
    traced = trace(module, torch.randn(2, 3, 32, 32))
    found = {n.name: macs_of(n) for n in traced.data if macs_of(n)}
    expected = [16 * 256 * 27, 16 * 256 * 144, 16 * 256 * 144, 32 * 64 * 144, 320]
    assert list(found.values()) == expected


def test_a_model_for_one_frame_is_run_frame_by_frame():
    backbone = backbone_of(own_models.FixedBatch())
    assert backbone.traced.frame_by_frame
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    (scores,) = backbone.uncut(pixels)
    assert scores.shape == (3, 3)
    assert torch.allclose(scores[1:2], backbone.uncut(pixels[1:2])[0], atol=1e-6)
