"""Landing: small changes to a cut that bring it just below the limit, or make it cheaper."""

from __future__ import annotations

import math

import numpy as np

from fxprune.cuts import Problem
from fxprune.descent import approach, refill
from fxprune.merging import Ints

PATIENCE = 1.1  # a landing may cost this much more sensitivity than the overshoot did
PAIRED = 1000  # about how many changes of one group are paired with each other
CHECKED = 1024  # how many of these pairs are computed exactly, in batches
BATCH = 128
TRIED = 64  # how many changes of one group are followed by a landing of another
MARGIN = 0.02  # how far off the sum of two changes may be from their joint effect
ENUMERATED = 50_000  # how many cuts are tried one by one where nothing else landed
TRADES = 100


def land(problem: Problem, before: Ints, after: Ints) -> Ints | None:
    """Find the cheapest cut that lands, near the two between which the limit lies.

    Rounded widths come first, one group before two; then finer ones. A landing that costs far
    more sensitivity than ``after``, which saves more, is taken only if there is no other.
    """
    filled = refill(problem, after)
    if problem.lands(problem.value(filled)):
        return filled
    starts = (filled, after, before)
    spent = problem.total(after)
    for ceiling in (spent + (PATIENCE - 1) * abs(spent), math.inf):
        for rounding in range(len(problem.levels)):
            for search in (one_change, two_changes, change_and_land):
                landed = [search(problem, start, rounding, ceiling) for start in starts]
                if found := [cut for cut in landed if cut is not None]:
                    return min(found, key=problem.total)
        if (cut := _finely(problem, before)) is not None:
            return cut
    return enumerate_cuts(problem)


def _finely(problem: Problem, before: Ints) -> Ints | None:
    """Take the last steps in finer widths, of as many groups as need be."""
    for rounding in range(1, len(problem.levels)):
        if (cut := approach(problem, before, rounding)) is not None:
            return cut
    return None


def one_change(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return the cheapest landing that differs in one group, if it costs less than the ceiling."""
    found = problem.widths(rounding, removed)
    lands = problem.lands(problem.value(removed) + found.values)
    lands &= found.losses < ceiling - problem.total(removed)
    if not lands.any():
        return None
    return found.apply(removed, int(np.where(lands, found.losses, np.inf).argmin()))


def two_changes(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return a cheap landing that differs a little in two groups, and costs less than the ceiling.

    Pairs that land if the effects of two changes add up are looked at first, cheapest first.
    """
    reach = max(1, min(6, PAIRED // (2 * len(problem.names))))
    found = problem.widths(rounding, removed, reach)
    one_share = (problem.value(removed) + found.values) / problem.limits
    share = one_share[:, None, :] + found.values / problem.limits
    near = (share <= 1 + MARGIN).all(axis=2)
    near &= (share >= 1 - problem.tolerance - MARGIN).any(axis=2)
    spent = found.losses[:, None] + found.losses[None, :]
    near &= spent < ceiling - problem.total(removed)
    near &= found.groups[:, None] < found.groups[None, :]
    first, second = np.nonzero(near)
    unlikely = ~problem.lands(share[first, second] * problem.limits)
    order = np.lexsort((spent[first, second], unlikely))[:CHECKED]
    for start in range(0, len(order), BATCH):
        one, two = first[order[start : start + BATCH]], second[order[start : start + BATCH]]
        cuts = np.repeat(removed[None], len(one), axis=0)
        cuts[np.arange(len(one)), found.groups[one]] = found.counts[one]
        cuts[np.arange(len(one)), found.groups[two]] = found.counts[two]
        lands = problem.lands(problem.costs.values(cuts))
        if lands.any():
            best: Ints = cuts[int(lands.argmax())]
            return best
    return None


def change_and_land(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return the cheapest landing that differs a little in one group and anyhow in another."""
    near = problem.widths(rounding, removed, reach=TRIED // len(problem.names) + 1)
    best = None
    for number in np.argsort(near.losses, kind="stable")[:TRIED].tolist():
        found = one_change(problem, near.apply(removed, number), rounding, ceiling)
        if found is not None:
            best, ceiling = found, problem.total(found)
    return best


def enumerate_cuts(problem: Problem) -> Ints | None:
    """Return the cheapest landing of all, where there are few enough cuts to try them all."""
    levels = problem.levels[-1]
    if math.prod(len(level) for level in levels) > ENUMERATED:
        return None
    grid = np.meshgrid(*levels, indexing="ij")
    cuts = np.stack([axis.reshape(-1) for axis in grid], axis=1)
    cuts = cuts[problem.lands(problem.costs.values(cuts))]
    return min(cuts, key=problem.total, default=None)


def trade(problem: Problem, removed: Ints) -> Ints:
    """Change one or two groups at a time as long as the cut lands and spends less."""
    for _ in range(TRADES):
        spent = problem.total(removed)
        ceiling = spent - 1e-9 * abs(spent)
        found = one_change(problem, removed, 0, ceiling)
        if found is None:
            found = two_changes(problem, removed, 0, ceiling)
        if found is None:
            break
        removed = found
    return removed
