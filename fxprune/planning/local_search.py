"""Landing: small changes to a cut that bring it just below the limit, or make it cheaper."""

from __future__ import annotations

import math

import numpy as np

from fxprune.planning.greedy import approach, refill
from fxprune.planning.problem import Problem
from fxprune.structure.merging import Ints

MAX_RELATIVE_LOSS = 1.1  # a landing may cost this much more sensitivity than the overshoot did
MAX_PAIRED_CHANGES = 1000  # about how many changes of one group are paired with each other
MAX_EXACT_PAIRS = 1024  # how many of these pairs are computed exactly, in batches
PAIRS_PER_BATCH = 256
MAX_FOLLOWED_CHANGES = 64  # how many changes of one group are followed by a landing of another
MAX_INTERACTION = 0.02  # how far off the sum of two changes may be from their joint effect
MAX_ENUMERATED_CUTS = 4096  # how many cuts are tried one by one before anything else
MAX_TRADES = 100


def land(problem: Problem, before: Ints, after: Ints) -> Ints | None:
    """Find the cheapest cut that lands, near the two between which the limit lies.

    Rounded widths come first, then finer ones. A landing that costs far more sensitivity than
    ``after``, which saves as much or more, is taken only if there is no other. Where there are few
    cuts, the best of all is found.
    """
    spent = problem.total(after)
    ceiling = spent + (MAX_RELATIVE_LOSS - 1) * abs(spent)
    best = enumerate_cuts(problem, 0)
    if best is not None and problem.total(best) <= ceiling:
        return best
    found = _near(problem, before, after, ceiling)
    if found is None:
        found = _finely(problem, before)
    if found is None:
        found = best if best is not None else _near(problem, before, after, math.inf)
    if found is None:
        return enumerate_cuts(problem, len(problem.levels) - 1)
    return found


def _near(problem: Problem, before: Ints, after: Ints, ceiling: float) -> Ints | None:
    """Find a landing below a ceiling of sensitivity, with as few finer widths as possible."""
    starts = [refill(problem, after), after, before]
    ends = [*starts[:2], approach(problem, before, 0)]
    landed = [cut for cut in ends if cut is not None and problem.lands(problem.value(cut))]
    for rounding in range(len(problem.levels)):
        for search in (one_change, two_changes, change_and_land):
            if landed := [cut for cut in landed if problem.total(cut) <= ceiling]:
                return min((trade(problem, cut) for cut in landed), key=problem.total)
            tried = [search(problem, start, rounding, ceiling) for start in starts]
            landed = [cut for cut in tried if cut is not None]
    return min(landed, key=problem.total, default=None)


def _finely(problem: Problem, before: Ints) -> Ints | None:
    """Take the last steps in finer widths, of as many groups as need be."""
    for rounding in range(1, len(problem.levels)):
        if (cut := approach(problem, before, rounding)) is not None:
            return cut
    return None


def one_change(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return the cheapest landing, up to a ceiling, that differs in one group."""
    found = problem.widths(rounding, removed)
    lands = problem.lands(problem.value(removed) + found.values)
    lands &= found.losses <= ceiling - problem.total(removed)
    if not lands.any():
        return None
    return found.apply(removed, int(np.where(lands, found.losses, np.inf).argmin()))


def two_changes(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return a cheap landing, up to a ceiling, that differs a little in two groups.

    Pairs that land if the effects of two changes add up are looked at first, cheapest first.
    """
    reach = max(1, min(6, MAX_PAIRED_CHANGES // (2 * len(problem.names))))
    found = problem.widths(rounding, removed, reach)
    one_share = (problem.value(removed) + found.values) / problem.limits
    share = one_share[:, None, :] + found.values / problem.limits
    near = (share <= 1 + MAX_INTERACTION).all(axis=2)
    near &= (share >= 1 - problem.tolerance - MAX_INTERACTION).any(axis=2)
    spent = found.losses[:, None] + found.losses[None, :]
    near &= spent <= ceiling - problem.total(removed)
    near &= found.groups[:, None] < found.groups[None, :]
    first, second = np.nonzero(near)
    unlikely = ~problem.lands(share[first, second] * problem.limits)
    order = np.lexsort((spent[first, second], unlikely))[:MAX_EXACT_PAIRS]
    for start in range(0, len(order), PAIRS_PER_BATCH):
        one, two = (
            first[order[start : start + PAIRS_PER_BATCH]],
            second[order[start : start + PAIRS_PER_BATCH]],
        )
        cuts = np.repeat(removed[None], len(one), axis=0)
        cuts[np.arange(len(one)), found.groups[one]] = found.counts[one]
        cuts[np.arange(len(one)), found.groups[two]] = found.counts[two]
        lands = problem.lands(problem.costs.values(cuts))
        if lands.any():
            best: Ints = cuts[int(lands.argmax())]
            return best
    return None


def change_and_land(problem: Problem, removed: Ints, rounding: int, ceiling: float) -> Ints | None:
    """Return the cheapest landing, up to a ceiling, that differs in two groups, little in one."""
    near = problem.widths(rounding, removed, reach=MAX_FOLLOWED_CHANGES // len(problem.names) + 1)
    best = None
    for number in np.argsort(near.losses, kind="stable")[:MAX_FOLLOWED_CHANGES].tolist():
        found = one_change(problem, near.apply(removed, number), rounding, ceiling)
        if found is not None:
            best, ceiling = found, problem.total(found)
    return best


def enumerate_cuts(problem: Problem, rounding: int) -> Ints | None:
    """Return the cheapest landing of all, if there are few enough cuts to try them all."""
    levels = problem.levels[rounding]
    if math.prod(len(level) for level in levels) > MAX_ENUMERATED_CUTS:
        return None
    grid = np.meshgrid(*levels, indexing="ij")
    cuts = np.stack([axis.reshape(-1) for axis in grid], axis=1)
    parts = [
        cuts[start : start + PAIRS_PER_BATCH] for start in range(0, len(cuts), PAIRS_PER_BATCH)
    ]
    lands = np.concatenate([problem.lands(problem.costs.values(part)) for part in parts])
    return min(cuts[lands], key=problem.total, default=None)


def trade(problem: Problem, removed: Ints) -> Ints:
    """Change one or two groups at a time as long as the cut lands and spends less."""
    for _ in range(MAX_TRADES):
        spent = problem.total(removed)
        ceiling = spent - 1e-9 * abs(spent) - 1e-300
        tried = (search(problem, removed, 0, ceiling) for search in (one_change, two_changes))
        found = next((cut for cut in tried if cut is not None), None)
        if found is None:
            break
        removed = found
    return removed
