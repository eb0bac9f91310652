"""The solver: how many units each group loses so that a budget is met at the least sensitivity.

Units go in order of their scores within a group, so a cut is one number per group. From the whole
network, the solver takes one width step at a time, always the one that costs the least sensitivity
per unit of cost saved, costs being exact after every step. If the last step saves too much, it
gives back what it can, and looks for the cheapest way to land just below the limit: another width
of one group or of two, first among rounded widths, then among ever finer ones for those groups
alone. Last, groups trade widths as long as that lowers the total.

The steps towards a smaller budget begin with those towards a larger one; only landing and trading
depart from that, and only for a few groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fxprune.errors import BudgetError
from fxprune.graph.notebook import plural
from fxprune.planning.budget import Target, readable
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.greedy import descend
from fxprune.planning.local_search import land
from fxprune.planning.problem import Problem
from fxprune.structure.merging import Ints

MAX_UNUSED = 0.05  # of a budget, where units are too coarse for the tolerance


@dataclass(frozen=True, eq=False)
class Solution:
    """A cut that meets the budget.

    Attributes:
        removed: how many units each group loses.
        values: the costs then, by quantity of the problem.
        loss: the sensitivity spent.
        notes: where the solver departed from what was asked.

    """

    removed: Ints
    values: Floats
    loss: float
    notes: tuple[str, ...] = ()


def solve(problem: Problem) -> Solution:
    """Find a cut within all limits that uses one of them up to within the tolerance.

    Where units are too coarse for that, one that exceeds a limit by no more than the tolerance, or
    else one that leaves at most 5 % of it unused; the notes say so.

    Raises:
        BudgetError: there is none, or none was found; the message says what stops it.

    """
    least = problem.least()
    values = problem.value(least)
    if (values <= problem.limits).all():
        note = () if problem.lands(values) else ("the budget is met without removing more",)
        return Solution(least, values, problem.total(least), note)
    before, after = _descend(problem)
    found = land(problem, before, after)
    if found is None:
        return _just_above(problem, before, after)
    return Solution(found, problem.value(found), problem.total(found), _notes(problem, found))


def _just_above(problem: Problem, before: Ints, after: Ints) -> Solution:
    """Land within the tolerance above the limit, where units are too coarse to land below."""
    above = problem.limits * (1 + problem.tolerance)
    wider = replace(problem, limits=above, tolerance=1 - 1 / (1 + problem.tolerance))
    found = land(wider, before, after)
    if found is None:
        return _further_below(problem, before, after)
    values = problem.value(found)
    over = 100 * float((values / problem.limits).max() - 1)
    note = f"the budget is exceeded by {over:.2g} %, because no plan ends equally close below it"
    return Solution(found, values, problem.total(found), (*_notes(problem, found), note))


def _further_below(problem: Problem, before: Ints, after: Ints) -> Solution:
    """Land a little further below the limit, where single units are too coarse to end closer."""
    found = land(replace(problem, tolerance=MAX_UNUSED), before, after)
    if found is None:
        raise BudgetError(_cannot_land(problem, before, after))
    values = problem.value(found)
    unused = 100 * (1 - float((values / problem.limits).max()))
    note = f"{unused:.2g} % of the budget is not used, because no plan ends closer to it"
    return Solution(found, values, problem.total(found), (*_notes(problem, found), note))


def _descend(problem: Problem) -> tuple[Ints, Ints]:
    """Return the last cut above a limit and the first below, with rounding while possible."""
    removed = problem.least()
    for rounding in range(len(problem.levels)):
        removed, after = descend(problem, removed, rounding)
        if after is not None:
            return removed, after
    raise BudgetError(_out_of_reach(problem, problem.value(removed)))


def _notes(problem: Problem, removed: Ints) -> tuple[str, ...]:
    notes = []
    for number, count in enumerate(removed.tolist()):
        allowed = [count in levels[number] for levels in problem.levels]
        if not allowed[0]:
            kept, total = problem.left(number, count)
            label = problem.labels[allowed.index(True)] if any(allowed) else "the finest"
            notes.append(
                f"{problem.names[number]} keeps {kept} of {total} units, a width "
                f"rounded to {label} instead of {problem.labels[0]}, to meet the budget"
            )
    return tuple(notes)


def _out_of_reach(problem: Problem, values: Floats) -> str:
    bare = problem.value(problem.sizes - 1)
    share = values / problem.limits
    worst = int(share.argmax())
    quantity, limit = problem.costs.quantities[worst], float(problem.limits[worst])
    text = (
        f"the budget allows {readable(quantity, limit)}, but with every group at its smallest "
        f"width, {readable(quantity, float(values[worst]))} remain; "
    )
    if bare[worst] > limit:
        return text + (
            f"with one unit per group it would still be {readable(quantity, float(bare[worst]))}, "
            "because the rest is in layers that cannot shrink: raise the budget, or see "
            "'fxprune inspect' for what is frozen and why"
        )
    tight = np.flatnonzero(problem.most() < problem.sizes - 1)
    names = ", ".join(problem.names[number] for number in tight[:3])
    return text + (
        f"already at their smallest width: {plural(len(tight), 'group')} "
        f"({names}{', ...' * (len(tight) > 3)}); relax "
        "min-units, max-ratio, protect, ratios or the rounding, or raise the budget"
    )


def _cannot_land(problem: Problem, before: Ints, after: Ints) -> str:
    shares = problem.value(after) / problem.limits
    binding = int(shares.argmax())
    quantity, limit = problem.costs.quantities[binding], float(problem.limits[binding])
    above, below = float(problem.value(before)[binding]), float(shares[binding] * limit)
    changed = problem.names[int(np.flatnonzero(before != after)[0])]
    return (
        f"no plan was found within {100 * problem.tolerance:.3g} % of {readable(quantity, limit)}: "
        f"the nearest plans keep {readable(quantity, above)} and {readable(quantity, below)}, and "
        f"differ by one width of {changed}; set {Target.exactly(quantity, below)}, or allow "
        f"tolerance={1 - shares[binding]:.1%}"
    )
