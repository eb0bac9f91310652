"""Descent: width steps towards a budget, one at a time, and back from an overshoot."""

from __future__ import annotations

import numpy as np

from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.problem import Changes, Problem
from fxprune.structure.merging import Ints


def descend(problem: Problem, removed: Ints, rounding: int) -> tuple[Ints, Ints | None]:
    """Take the cheapest width steps from a cut until all limits are met.

    Returns:
        The last cut that is above a limit, and the first that is not, or None if the steps of
        this rounding run out before.

    """
    values = problem.value(removed)
    while True:
        steps = problem.steps(rounding, removed)
        if not len(steps.groups):
            return removed, None
        before, removed = removed, steps.apply(removed, _cheapest(problem, values, steps))
        values = problem.value(removed)
        if (values <= problem.limits).all():
            return before, removed


def approach(problem: Problem, removed: Ints, rounding: int) -> Ints | None:
    """Take the cheapest width steps that do not save too much, until the cut lands.

    Returns:
        None if the steps run out before.

    """
    while True:
        values = problem.value(removed)
        if problem.lands(values):
            return removed
        steps = problem.steps(rounding, removed)
        share = (values + steps.values) / problem.limits
        steps = steps.where(np.asarray((share >= 1 - problem.tolerance).any(axis=1)))
        if not len(steps.groups):
            return None
        removed = steps.apply(removed, _cheapest(problem, values, steps))


def _cheapest(problem: Problem, values: Floats, steps: Changes) -> int:
    """Choose the step with the least sensitivity per cost saved, weighing costs by their excess."""
    excess = np.maximum(values / problem.limits - 1, 0)
    saved = -(steps.values / problem.limits) @ excess
    if not (saved > 0).any():
        return int(steps.losses.argmin())
    price = np.divide(steps.losses, saved, out=np.full(len(saved), np.inf), where=saved > 0)
    return int(price.argmin())


def refill(problem: Problem, removed: Ints, rounding: int = 0) -> Ints:
    """Give width steps back within the limits, those that save the most sensitivity first."""
    while True:
        steps = problem.steps(rounding, removed, back=True)
        values = problem.value(removed) + steps.values
        fits = (values <= problem.limits).all(axis=1) & (steps.losses < 0)
        if not fits.any():
            return removed
        added = np.maximum((steps.values / problem.limits).sum(axis=1), 1e-12)
        price = np.where(fits, -steps.losses / added, -np.inf)
        removed = steps.apply(removed, int(price.argmax()))
