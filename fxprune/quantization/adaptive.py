"""Which weights to round up and which down, so that a layer's output moves least.

With codes ``c``, weights ``u`` in steps and second moments ``H`` of the layer's inputs, an output
moves by ``(c - u)' H (c - u)`` in the mean square. Rounding to the nearest code is best only where
inputs are uncorrelated (arXiv 2004.10568). Two ways are tried from there, and the better one is
taken output by output: column after column, each compensated by what is still to be rounded
(GPTQ, arXiv 2210.17323); and single roundings turned over while that helps, as coordinate descent
does (arXiv 2309.01885), which follows the first way too. Codes are next to their weights, above
or below, so that limits on sums of neighbours hold. Everything is float64 and runs over
groups x outputs x features.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the moments' mean square, where columns are compensated
SWEEPS = 10  # over all columns, at most
FLOOR = 1e-30  # of the moments' mean square, where inputs are all zero


def moved(change: Tensor, gram: Tensor) -> Tensor:
    """Return how far outputs move: the quadratic form of a change, groups x outputs."""
    return (change @ gram * change).sum(2)


def round_adaptively(steps: Tensor, gram: Tensor, limit: int) -> Tensor:
    """Return codes, groups x outputs x features.

    Args:
        steps: the weights over their scales, groups x outputs x features.
        gram: second moments of the inputs, groups x features x features.
        limit: the highest code, and less the sign the lowest.

    """
    low = steps.floor().clamp(-limit, limit)
    high = steps.ceil().clamp(-limit, limit)
    nearest = steps.round().clamp(-limit, limit)
    found = [
        _descend(start, steps, low, high, gram)
        for start in (nearest, _compensated(steps, low, high, gram))
    ]
    first, second = (moved(codes - steps, gram) for codes in found)
    return torch.where((second < first).unsqueeze(2), found[1], found[0])


def _compensated(steps: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> Tensor:
    """Round column after column, the strongest input first; later columns make good the error."""
    features = gram.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2)
    order = scale.argsort(1, descending=True)
    rows = order.unsqueeze(1).expand_as(steps)
    eye = torch.eye(features, dtype=gram.dtype, device=gram.device)
    damped = gram + DAMPING * scale.mean(1).clamp_min(FLOOR).view(-1, 1, 1) * eye
    damped = damped.gather(1, order.unsqueeze(2).expand_as(gram))
    damped = damped.gather(2, order.unsqueeze(1).expand_as(gram))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, floor, ceiling = (tensor.gather(2, rows).clone() for tensor in (steps, low, high))
    codes = torch.empty_like(rest)
    for column in range(features):
        value = rest[:, :, column]
        codes[:, :, column] = value.round().clamp(floor[:, :, column], ceiling[:, :, column])
        line = upper[:, column, column:]
        error = (value - codes[:, :, column]) / line[:, :1]
        rest[:, :, column:] -= error.unsqueeze(2) * line.unsqueeze(1)
    return torch.empty_like(codes).scatter(2, rows, codes)


def _descend(codes: Tensor, steps: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> Tensor:
    """Turn over single roundings for as long as outputs move less by it."""
    codes = codes.clone()
    slope = (codes - steps) @ gram
    scale = gram.diagonal(dim1=1, dim2=2)
    for _ in range(SWEEPS):
        turned = torch.zeros((), dtype=torch.int64, device=codes.device)
        for column in range(gram.shape[1]):
            turn = low[:, :, column] + high[:, :, column] - 2 * codes[:, :, column]
            gain = 2 * turn * slope[:, :, column] + turn.square() * scale[:, column, None]
            turn = torch.where(gain < 0, turn, 0.0)
            codes[:, :, column] += turn
            slope += turn.unsqueeze(2) * gram[:, column, None, :]
            turned += turn.count_nonzero()
        if not turned:
            break
    return codes
