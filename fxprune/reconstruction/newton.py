"""Newton's method without a matrix: conjugate gradients, and a line search that only descends.

Vectors are tuples of tensors, one per variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]
Product = Callable[[Vector], Vector]
ARMIJO_FRACTION = 1e-4  # least decrease, relative to that of the linear model (Armijo 1966)
MAX_HALVINGS = 8


@dataclass(frozen=True)
class Direction:
    """The direction that conjugate gradients found, and the number of steps."""

    vector: Vector
    steps: int


def dot(a: Vector, b: Vector) -> float:
    """Return the inner product, in double precision."""
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def along(a: Vector, scale: float, b: Vector) -> Vector:
    """Return ``a + scale * b``."""
    return tuple(x + scale * y for x, y in zip(a, b, strict=True))


def conjugate_gradients(
    product: Product,
    gradient: Vector,
    *,
    damping: float,
    tolerance: float,
    max_steps: int,
    precondition: Product | None = None,
) -> Direction:
    """Solve ``(H + damping * h * I) d = -g`` roughly, for a descent direction.

    ``h`` is the curvature along the gradient. If a direction has negative curvature, the search
    ends and returns the direction so far, or that of steepest descent (Steihaug 1983).

    Args:
        product: multiplies by H.
        gradient: g.
        damping: relative to ``h``.
        tolerance: residual at which to stop, relative to the gradient.
        max_steps: largest number of steps.
        precondition: multiplies by an approximate inverse of H.

    """
    precondition = precondition or (lambda vector: vector)
    found = tuple(torch.zeros_like(part) for part in gradient)
    residual = tuple(-part for part in gradient)
    size = math.sqrt(dot(gradient, gradient))
    if size == 0:
        return Direction(found, 0)
    ready = precondition(residual)
    direction, slope = ready, dot(residual, ready)
    shift: float | None = None
    for step in range(1, max_steps + 1):
        image = product(direction)
        if shift is None:
            shift = damping * max(dot(direction, image), 0.0) / dot(direction, direction)
        image = along(image, shift, direction)
        curvature = dot(direction, image)
        if not curvature > 0:
            return Direction(found if step > 1 else direction, step)
        length = slope / curvature
        found = along(found, length, direction)
        residual = along(residual, -length, image)
        if math.sqrt(dot(residual, residual)) <= tolerance * size:
            return Direction(found, step)
        ready = precondition(residual)
        last, slope = slope, dot(residual, ready)
        direction = along(ready, slope / last, direction)
    return Direction(found, max_steps)


def line_search(
    loss: Callable[[Vector], float], here: Vector, at: float, direction: Vector, slope: float
) -> tuple[Vector, float] | None:
    """Return a point along a direction with a smaller loss, and its loss; None if none is found.

    Args:
        loss: the function to reduce.
        here: the starting point.
        at: the loss there.
        direction: the full step, which is tried first; every further try halves it.
        slope: the derivative of the loss along the direction, negative.

    """
    for halvings in range(MAX_HALVINGS):
        length = 0.5**halvings
        point = along(here, length, direction)
        value = loss(point)
        if value < at and value <= at + ARMIJO_FRACTION * length * min(slope, 0.0):
            return point, value
    return None
