"""Newton's method without its matrix: conjugate gradients, and a step that is never uphill.

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
ENOUGH = 1e-4  # the share of the decrease that a linear model promises (Armijo 1966)
HALVINGS = 8


@dataclass(frozen=True)
class Direction:
    """What conjugate gradients found: a direction, and in how many steps."""

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
    most: int,
    precondition: Product | None = None,
) -> Direction:
    """Solve ``(H + damping * h * I) d = -g`` roughly, for a descent direction.

    ``h`` is the curvature along the gradient. Where the curvature is negative the search ends: with
    what has been found so far, or with steepest descent (Steihaug 1983).

    Args:
        product: multiplies by H.
        gradient: g.
        damping: relative to ``h``.
        tolerance: of the residual, relative to the gradient.
        most: steps at most.
        precondition: multiplies by something like the inverse of H.

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
    for step in range(1, most + 1):
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
    return Direction(found, most)


def line_search(
    loss: Callable[[Vector], float], here: Vector, at: float, direction: Vector, slope: float
) -> tuple[Vector, float] | None:
    """Return a point down a direction and its loss; None if there is none near enough.

    Args:
        loss: what has to fall.
        here: where to start.
        at: the loss there.
        direction: where to go; the first try goes all the way, each further one half as far.
        slope: what the loss changes by at first, negative.

    """
    for halvings in range(HALVINGS):
        length = 0.5**halvings
        point = along(here, length, direction)
        value = loss(point)
        if value < at and value <= at + ENOUGH * length * min(slope, 0.0):
            return point, value
    return None
