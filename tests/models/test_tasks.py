"""What outputs mean, and when two answers agree."""

import numpy as np
import pytest
import torch
from headrace.models.class_map import MAX_SIDE, decode_class_map, encode_class_map
from headrace.models.exceptions import BackboneError, BitstreamError, LimitError
from headrace.models.tasks import Answers, Boxes, Classification, ClassMap, Detection, Labels, Segmentation, Several


def boxes(*rows: tuple[int, float, float]) -> Boxes:
    """Boxes of 10x10 pixels: class, score, left."""
    return Boxes(
        tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple((r[2], 0.0, r[2] + 10, 10.0) for r in rows)
    )


def test_labels_agree_where_the_best_is_the_same():
    task = Classification()
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    first, second = task.answers((scores,))
    assert first == Labels((1, 2, 0), tuple(scores[0, [1, 2, 0]].tolist()))
    assert task.agreement(first, first) == 1
    assert task.agreement(first, second) == 0


def test_of_overlapping_boxes_of_a_class_the_best_stays():
    task = Detection(size=100, minimum=0.1, overlap=0.5)
    corners = torch.tensor([[[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 200, 60], [-5, 0, 5, 10]]], dtype=torch.float32)
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.7], [0.05, 0.6], [0.0, 0.0]]])
    (found,) = task.answers((scores, corners))
    assert found.indexes == (0, 1, 1)
    assert found.scores == pytest.approx((0.9, 0.7, 0.6))
    assert found.corners[0] == (0, 0, 10, 10)
    assert found.corners[2] == (50, 50, 100, 60), "clipped to the input"


def test_each_class_may_have_its_own_corners():
    task = Detection(size=100)
    corners = torch.zeros(1, 2, 3, 4)
    corners[0, 1, 2] = torch.tensor([10.0, 20, 30, 40])
    scores = torch.zeros(1, 2, 3)
    scores[0, 1, 2] = 0.9
    (found,) = task.answers((scores, corners))
    assert (found.indexes, found.corners) == ((2,), ((10, 20, 30, 40),))


@pytest.mark.parametrize(
    ("mine", "theirs", "f1"),
    [
        (boxes(), boxes(), 1.0),
        (boxes((0, 0.9, 0)), boxes(), 0.0),
        (boxes((0, 0.1, 0)), boxes(), 1.0),  # not confident
        (boxes((0, 0.9, 0)), boxes((0, 0.8, 2)), 1.0),
        (boxes((0, 0.9, 0)), boxes((0, 0.8, 8)), 0.0),  # too little overlap
        (boxes((0, 0.9, 0)), boxes((1, 0.8, 0)), 0.0),  # another class
        (boxes((0, 0.9, 0), (0, 0.8, 1)), boxes((0, 0.9, 0)), 2 / 3),  # one of ours is too many
        (boxes((0, 0.9, 0)), boxes((0, 0.9, 0), (1, 0.9, 50)), 2 / 3),
    ],
)
def test_boxes_agree_by_f1(mine, theirs, f1):
    assert Detection(size=100).agreement(mine, theirs) == pytest.approx(f1)


def test_class_maps_agree_by_the_share_of_pixels():
    task = Segmentation()
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0] = 1
    logits[0, 2, 1] = 1
    (found,) = task.answers((logits,))
    assert (found.classes == [[1, 1], [2, 2]]).all()
    assert task.agreement(found, ClassMap(np.array([[1, 0], [2, 2]], np.uint8))) == 0.75
    with pytest.raises(BackboneError, match="256 classes"):
        task.answers((torch.zeros(1, 300, 2, 2),))


def test_several_tasks_answer_from_one_set_of_outputs():
    task = Several((Classification(), Detection(64)))
    assert (task.name, task.takes) == ("classification+detection", 3)
    scores, corners = torch.zeros(2, 4, 3), torch.tensor([[[0.0, 0, 9, 9]] * 4] * 2)
    scores[1, 2, 1] = 0.9
    found = task.answers((torch.tensor([[0.2, 0.8], [0.6, 0.4]]), scores, corners))
    assert [x.parts[0].indexes[0] for x in found] == [1, 0]
    assert [x.parts[1].indexes for x in found] == [(), (1,)]
    assert task.agreement(found[0], found[0]) == 1
    assert task.agreement(Answers((found[0].parts[0], found[1].parts[1])), found[1]) == 0.5, "the label is another"
    with pytest.raises(BackboneError, match="names a task twice"):
        Several((Classification(), Classification()))


@pytest.mark.parametrize(
    ("task", "shapes"),
    [
        (Classification(), [(2, 5)]),
        (Detection(size=64), [(2, 7, 3), (2, 7, 4)]),
        (Detection(size=64), [(2, 7, 3), (2, 7, 3, 4), (2, 11)]),
        (Segmentation(), [(2, 4, 6, 6)]),
        (Several((Detection(size=64), Segmentation())), [(2, 7, 3), (2, 7, 4), (2, 4, 6, 6)]),
    ],
)
def test_a_probe_has_a_gradient_that_the_seed_fixes(task, shapes):
    raw = [torch.randn(s, generator=torch.Generator().manual_seed(1)).requires_grad_(True) for s in shapes]
    outputs = [r.softmax(1) if i == 0 and task.name == "classification" else r.sigmoid() for i, r in enumerate(raw)]

    def gradients(seed: int) -> list[torch.Tensor]:
        scalar = task.probe(outputs, torch.Generator().manual_seed(seed))
        assert scalar.shape == ()
        return list(torch.autograd.grad(scalar, raw, retain_graph=True))

    first, again, other = gradients(3), gradients(3), gradients(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(g.abs().max() > 0 for g in first)


def test_class_maps_survive_the_wire():
    classes = np.random.default_rng(0).integers(0, 256, (37, 52), dtype=np.uint8)
    assert (decode_class_map(encode_class_map(classes)) == classes).all()


def test_what_is_no_class_map_is_refused_before_it_is_decoded():
    with pytest.raises(BitstreamError, match="not a class map"):
        decode_class_map(b"no picture")
    with pytest.raises(LimitError):
        decode_class_map(encode_class_map(np.zeros((1, MAX_SIDE + 1), np.uint8)))
    with pytest.raises(LimitError):
        decode_class_map(bytes(5 * 2**20))
    with pytest.raises(BitstreamError, match="one byte a pixel"):
        decode_class_map(encode_class_map(np.zeros((4, 4, 3), np.uint8)))
