"""How sure an exit is: from its two best scores to the probability that its label is the uncut model's.

A temperature makes the scores honest on the whole (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017);
a logistic function of the best score's log-odds and of its lead over the second (Platt, "Probabilistic Outputs for
Support Vector Machines", 1999) makes a probability of them. Both are fitted on unlabelled
photographs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..bundle_specs import LEAST_SCORE, ExitSpec

Floats = npt.NDArray[np.float64]

COLDEST, HOTTEST, HALVINGS = 0.3, 5.0, 40
RIDGE = 1.0
"""Weight of the squares of the logistic function's weights, so that few photographs do not make it sure of itself."""
ROUNDS = 50
BINS = 10


def fit_temperature(logits: Floats, labels: npt.NDArray[np.int64]) -> float:
    """The temperature at which these labels are likeliest.

    Args:
        logits: float64 [N, classes].
        labels: int64 [N], the uncut model's.
    """
    golden = (5**0.5 - 1) / 2
    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(HALVINGS):
        first, second = high - golden * (high - low), low + golden * (high - low)
        if _surprise(logits, labels, np.exp(first)) < _surprise(logits, labels, np.exp(second)):
            high = second
        else:
            low = first
    return float(np.exp((low + high) / 2))


def scores_of(logits: Floats, temperature: float) -> Floats:
    """float64 [N, classes] that sum to 1."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def tempered(scores: Floats, temperature: float) -> Floats:
    """Scores float64 [N, classes] at temperature 1 -> the same at another one."""
    return scores_of(np.log(np.maximum(scores, 1e-30)), temperature)


def best_two(scores: Floats) -> tuple[Floats, Floats]:
    """The best and the second of scores [N, classes], each float64 [N]."""
    ordered = np.partition(scores, -2, axis=1)
    return ordered[:, -1], ordered[:, -2]


def fit_confidence(best: Floats, second: Floats, right: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Offset and weights as `ExitSpec.confidence` has them, by Newton's method.

    Args:
        best, second: the two best scores of each photograph, float64 [N].
        right: bool [N], whether the best one's label is the uncut model's.
    """
    given = _inputs(best, second)
    weights = np.zeros(3)
    penalty = np.diag([1e-6, RIDGE, RIDGE])
    for _ in range(ROUNDS):
        found = 1 / (1 + np.exp(-given @ weights))
        slope = given.T @ (found - right) + penalty @ weights
        curvature = (given * (found * (1 - found))[:, None]).T @ given + penalty
        step = np.linalg.solve(curvature, slope)
        # Far from the optimum a whole step can overshoot.
        weights -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
    return float(weights[0]), float(weights[1]), float(weights[2])


def confidences(spec: ExitSpec, best: Floats, second: Floats) -> Floats:
    """`ExitSpec.sure` of many photographs, float64 [N]."""
    return np.array([spec.sure(float(b), float(s)) for b, s in zip(best, second, strict=True)])


def calibration_error(confidence: Floats, right: npt.NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence and truth over bins of as many photographs each."""
    order = np.argsort(confidence)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(abs(confidence[p].mean() - right[p].mean()) * len(p) for p in parts) / max(len(order), 1))


def surest(confidence: Floats, share: float = 0.25) -> npt.NDArray[np.intp]:
    """Indexes of that share of the photographs of which the exit is surest, at least one."""
    count = max(1, round(share * len(confidence)))
    return np.argsort(-confidence, kind="stable")[:count]


def _inputs(best: Floats, second: Floats) -> Floats:
    first = np.clip(best, LEAST_SCORE, 1 - LEAST_SCORE)
    return np.stack(
        [np.ones_like(first), np.log(first / (1 - first)), np.log(first / np.maximum(second, LEAST_SCORE))], 1
    )


def _surprise(logits: Floats, labels: npt.NDArray[np.int64], temperature: float) -> float:
    found = scores_of(logits, temperature)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(found, 1e-12)).mean())
