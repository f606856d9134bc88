"""The closed-form bottleneck: a pretrained backbone, cut without training a weight.

At the cut, from unlabelled photographs, for features f [C, H, W] with mean m [C, H, W]:

    S = covariance of f - m           M = mean of g g^T + a little identity, g = a gradient of the answer at the cut

M is the Fisher metric: d^T M d is, to second order, by how much a disturbance d of the features changes the answer
(Amari, "Natural Gradient Works Efficiently in Learning", 1998). Both are matrices over all C H W numbers, far too
large to be estimated; both are taken as a Kronecker product of one matrix for the channels, one for the rows and one
for the columns (as in Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
2015), found by the flip-flop of Dutilleul ("The MLE algorithm for the matrix normal distribution", 1999): each
factor from data in which the others are whitened. Then, for every factor, with M = A^T A and A S A^T = U D U^T,

    encoder = U^T A                   decoder = A^-1 U

which is the Karhunen-Loève transform under that metric: the components are uncorrelated, plain squared error between
them is error in the answer, and one quantiser step for all of them is the right one. Applied along channels, rows and
columns it is a separable transform of the whole map: what most tails ask is close to a sum over places, so gradients
at different places are alike, and patterns that cancel in such a sum may be coarse or left out. What the product of
three factors misses is made up for by a weight a component, from the gradients' mean square in that component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.05
"""The little identity, relative to the mean diagonal of each factor of the metric: what looks irrelevant on some
photographs may matter on the next one."""
PROBES = 1
"""Gradients a photograph. More photographs are worth more than more gradients of each."""
SWEEPS = 2
"""Rounds of the flip-flop; a third changes bytes by less than trials can tell."""
MAX_SIDE = 256
"""Rows or columns beyond this many are left as they are: their matrices would outweigh what they save."""
WEIGHT_POWER = 0.75
"""0 would trust the product of the factors, 1 each component's own gradients, which are fewer."""
WEIGHT_LIMITS = (0.05, 20.0)
"""Bounds of a component's mean squared gradient, relative to the geometric mean over all."""
VARIANCE_FLOOR = 1e-3
"""Share of the mean variance below which a component counts as this much when it is whitened."""


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """A separable transform of a map, its axes in the order channels, rows, columns.

    Attributes:
        mean: float32 [C, H, W].
        encoders: float32 [C, C], [H, H], [W, W]; row i of a matrix gives component i.
        decoders: their inverses.
        weights: float32 [C, H, W], positive; components are multiplied by them.
        sensitivities: float32 [C, H, W], mean squared gradient along each component, after that multiplication.
    """

    mean: Tensor
    encoders: tuple[Tensor, Tensor, Tensor]
    decoders: tuple[Tensor, Tensor, Tensor]
    weights: Tensor
    sensitivities: Tensor

    def encode(self, features: Tensor) -> Tensor:
        """Components float32 [N, C, H, W] of features float32 [N, C, H, W]."""
        latent = features - self.mean
        for axis, matrix in enumerate(self.encoders):
            latent = along(latent, matrix, axis)
        return latent * self.weights


def fisher_gradients(
    tail: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Tensor],
    seed: int,
    probe: Callable[[Sequence[Tensor], torch.Generator], Tensor],
    note: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Gradients at a cut whose mean outer product is the Fisher metric.

    Args:
        tail: features [B, C, H, W] -> outputs, such as scores [B, classes] that sum to 1.
        batches: features float32 [B, C, H, W].
        seed: of the probes.
        probe: from outputs a scalar to differentiate, the sum over the batch; see `tasks.Task.probe`.
        note: called with the number of photographs done, after each batch.

    Returns:
        float32 [PROBES * N, C, H, W].

    Raises:
        ValueError: there are no batches.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for batch in batches:
        features = batch.clone().requires_grad_(True)
        outputs = tail(features)
        for left in reversed(range(PROBES)):
            (gradient,) = torch.autograd.grad(probe(outputs, generator), features, retain_graph=left > 0)
            found.append(gradient)
        note(len(batch))
    if not found:
        raise ValueError("no photographs")
    return torch.cat(found)


def fit_closed_form(features: Tensor, gradients: Tensor) -> ClosedForm:
    """Encoder and decoder for a map.

    Args:
        features: float32 [N, C, H, W] of the calibration photographs; H and W may be 1.
        gradients: float32 [M, C, H, W] of what the tail answers, M need not be N. Their scale matters
            to `sensitivities` alone.
    """
    mean = features.mean(0)
    centred = features - mean
    roots = metric_roots(gradients)
    scaled = centred
    for axis, root in enumerate(roots):
        scaled = along(scaled, root, axis)
    rotations = _rotations(scaled)
    encoders, decoders = [], []
    for root, rotation in zip(roots, rotations, strict=True):
        encoders.append((rotation.T @ root).float())
        decoders.append(torch.linalg.solve(root, rotation).float())
    squares = _mean_squares(gradients, decoders)
    typical = squares.clamp_min(squares.mean() * 1e-9).clamp_min(torch.finfo(torch.float64).tiny).log().mean().exp()
    weights = (squares / typical).clamp(*WEIGHT_LIMITS).pow(WEIGHT_POWER / 2)
    return ClosedForm(
        mean=mean,
        encoders=(encoders[0], encoders[1], encoders[2]),
        decoders=(decoders[0], decoders[1], decoders[2]),
        weights=weights.float(),
        sensitivities=(squares / weights.square()).float(),
    )


def metric_roots(gradients: Tensor) -> list[Tensor]:
    """Matrices A, float64, with A^T A the metric's factor, for channels, rows and columns of gradients [M, C, H, W].

    Every factor has mean diagonal 1 + `RIDGE`. An axis that is not transformed has the identity.
    """
    sizes = gradients.shape[1:]
    factors = [torch.eye(size, dtype=torch.float64) for size in sizes]
    # Sums of squares of gradients of 1e-6 would be lost in float32.
    gradients = gradients / gradients.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(SWEEPS):
        for axis in _transformed(sizes):
            whitened = gradients
            for other in _transformed(sizes):
                if other != axis:
                    whitened = along(whitened, torch.linalg.inv(torch.linalg.cholesky(factors[other])), other)
            gram = _gram(whitened, axis)
            scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            factors[axis] = gram / scale + RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    return [torch.linalg.cholesky(factor).T.contiguous() for factor in factors]


def along(maps: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply maps [N, C, H, W] by a matrix [n, n] along channels (0), rows (1) or columns (2)."""
    if len(matrix) == 1 and float(matrix) == 1.0:
        return maps
    matrix = matrix.to(maps.dtype)
    if axis == 2:
        return maps @ matrix.T
    if axis == 1:
        return matrix @ maps
    return (matrix @ maps.flatten(2)).reshape(maps.shape)


def _rotations(maps: Tensor) -> list[Tensor]:
    """Eigenvectors as columns, in falling order, of the factors of the covariance of maps [N, C, H, W]."""
    sizes = maps.shape[1:]
    rotations = [torch.eye(size, dtype=torch.float64) for size in sizes]
    variances = [torch.ones(size, dtype=torch.float64) for size in sizes]
    for _ in range(SWEEPS):
        for axis in _transformed(sizes):
            whitened = maps
            for other in _transformed(sizes):
                if other != axis:
                    deviation = variances[other].clamp_min(VARIANCE_FLOOR).sqrt()
                    whitened = along(whitened, rotations[other].T / deviation[:, None], other)
            values, vectors = torch.linalg.eigh(_gram(whitened, axis))
            values, vectors = values.flip(0), vectors.flip(1)
            variances[axis] = values / values.mean().clamp_min(torch.finfo(torch.float64).tiny)
            # A component's sign is arbitrary; the largest entry is made positive, so that runs can be compared.
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            rotations[axis] = vectors * largest.sign()
    return rotations


def _mean_squares(gradients: Tensor, decoders: Sequence[Tensor]) -> Tensor:
    """Mean squared gradient along each component, float64 [C, H, W], from gradients [M, C, H, W] of the features."""
    for axis, decoder in enumerate(decoders):
        gradients = along(gradients, decoder.T, axis)
    return gradients.double().square().mean(0)


def _transformed(sizes: torch.Size) -> list[int]:
    """Axes that have a transform: channels always, rows and columns unless there is one alone or too many."""
    return [axis for axis, size in enumerate(sizes) if axis == 0 or 1 < size <= MAX_SIDE]


def _gram(maps: Tensor, axis: int) -> Tensor:
    """Sums of products along an axis, float64 [n, n], of maps float32 [N, C, H, W]."""
    flat = maps.movedim(axis + 1, 0).flatten(1)
    return (flat @ flat.T).double()
