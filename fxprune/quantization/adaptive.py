"""Which weights to round up and which down, so that the output of a layer changes least.

With integers ``c``, weights ``u`` divided by their scales, and second moments ``H`` of the layer's
inputs, the mean squared change of an output is ``(c - u)' H (c - u)``. Rounding to nearest is
optimal only if inputs are uncorrelated (arXiv 2004.10568). Two methods are compared output by
output. Coordinate descent from the nearest integers flips single roundings while the error falls
(arXiv 2309.01885). GPTQ (arXiv 2210.17323) rounds column after column, where the columns still to
be rounded compensate for the error; coordinate descent follows it too. An integer is always the
next one above or below its weight, so that limits on sums of neighbours hold. Everything is float64
and has the shape groups x outputs x features.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_DAMPING = 0.01  # of GPTQ, relative to the mean square of the inputs
MAX_SWEEPS = 10  # of coordinate descent over all columns
MIN_MEAN_SQUARE = 1e-30  # of inputs that are all zero


def squared_change(change: Tensor, gram: Tensor) -> Tensor:
    """Return the mean squared change of outputs, groups x outputs, for a change of the weights."""
    return (change @ gram * change).sum(2)


def round_adaptively(steps: Tensor, gram: Tensor, limit: int) -> Tensor:
    """Return the rounded integers, groups x outputs x features.

    Args:
        steps: the weights divided by their scales, groups x outputs x features.
        gram: second moments of the inputs, groups x features x features.
        limit: the largest integer; the smallest is ``-limit``.

    """
    low = steps.floor().clamp(-limit, limit)
    high = steps.ceil().clamp(-limit, limit)
    nearest = steps.round().clamp(-limit, limit)
    found = [
        _descend(start, steps, low, high, gram)
        for start in (nearest, _compensated(steps, low, high, gram))
    ]
    first, second = (squared_change(integers - steps, gram) for integers in found)
    return torch.where((second < first).unsqueeze(2), found[1], found[0])


def _compensated(steps: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> Tensor:
    """Round column after column, the strongest input first; later columns compensate for errors."""
    features = gram.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2)
    order = scale.argsort(1, descending=True)
    rows = order.unsqueeze(1).expand_as(steps)
    eye = torch.eye(features, dtype=gram.dtype, device=gram.device)
    damped = gram + RELATIVE_DAMPING * scale.mean(1).clamp_min(MIN_MEAN_SQUARE).view(-1, 1, 1) * eye
    damped = damped.gather(1, order.unsqueeze(2).expand_as(gram))
    damped = damped.gather(2, order.unsqueeze(1).expand_as(gram))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, floor, ceiling = (tensor.gather(2, rows).clone() for tensor in (steps, low, high))
    integers = torch.empty_like(rest)
    for column in range(features):
        value = rest[:, :, column]
        integers[:, :, column] = value.round().clamp(floor[:, :, column], ceiling[:, :, column])
        line = upper[:, column, column:]
        error = (value - integers[:, :, column]) / line[:, :1]
        rest[:, :, column:] -= error.unsqueeze(2) * line.unsqueeze(1)
    return torch.empty_like(integers).scatter(2, rows, integers)


def _descend(integers: Tensor, steps: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> Tensor:
    """Flip single roundings while that reduces the change of outputs."""
    integers = integers.clone()
    slope = (integers - steps) @ gram
    scale = gram.diagonal(dim1=1, dim2=2)
    for _ in range(MAX_SWEEPS):
        flipped = torch.zeros((), dtype=torch.int64, device=integers.device)
        for column in range(gram.shape[1]):
            flip = low[:, :, column] + high[:, :, column] - 2 * integers[:, :, column]
            gain = 2 * flip * slope[:, :, column] + flip.square() * scale[:, column, None]
            flip = torch.where(gain < 0, flip, 0.0)
            integers[:, :, column] += flip
            slope += flip.unsqueeze(2) * gram[:, column, None, :]
            flipped += flip.count_nonzero()
        if not flipped:
            break
    return integers
