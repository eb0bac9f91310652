"""How many units each group loses, so that a budget is met at the least sensitivity.

Greedy over rounding steps: the step with the least sensitivity per cost saved comes first, and
costs are exact after every step, neighbours included. The end is made to land: steps that would
overshoot are passed over, then finer rounding is allowed, then one step is traded for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fxprune.budget import TOLERANCE
from fxprune.cost import CostModel, Quantity
from fxprune.errors import BudgetError
from fxprune.merging import Ints
from fxprune.widths import Width

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """Units removed per group, in the model's order, and what was given up to get there."""

    removed: Ints
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _State:
    model: CostModel
    limits: Mapping[Quantity, float]
    losses: Sequence[Floats]  # by group: sensitivity lost once 0, 1, 2 ... units are gone
    removed: Ints
    used: Floats = field(init=False)  # by quantity: cost over limit

    def __post_init__(self) -> None:
        self.used = self.usage(self.removed)

    def usage(self, removed: Ints) -> Floats:
        costs = self.model.quantities(removed)
        return np.array([costs[name] / limit for name, limit in self.limits.items()])

    def step(self, group: int, count: int) -> tuple[float, Floats]:
        """Sensitivity per saved cost of removing ``count`` units of a group, and the usage then."""
        changed = self.removed.copy()
        changed[group] = count
        used = self.usage(changed)
        over = self.used > 1
        saved = float((np.minimum(self.used, np.inf) - used)[over].sum())
        lost = float(self.losses[group][count] - self.losses[group][self.removed[group]])
        return (lost / saved if saved > 0 else np.inf), used

    def take(self, group: int, count: int, used: Floats) -> None:
        self.removed[group] = count
        self.used = used

    @property
    def met(self) -> bool:
        return bool(self.used.max() <= 1)


def solve(
    model: CostModel,
    scores: Sequence[Floats],
    widths: Sequence[Width],
    limits: Mapping[Quantity, float],
    round_to: int = 16,
    depthwise_round_to: int = 8,
) -> Solution:
    """Find how many units each group loses.

    Args:
        model: costs in closed form over the groups.
        scores: for each group, the score of every unit; the lowest go first.
        widths: for each group, what it may be cut to.
        limits: upper limits, absolute.
        round_to: channels should be multiples of this where twice as many remain.
        depthwise_round_to: the same for depthwise convolutions.

    Returns:
        A solution that meets every limit, the binding one within 1 %.

    Raises:
        BudgetError: no solution exists; the message says what stops it.

    """
    losses = [np.concatenate([[0.0], np.cumsum(np.sort(unit))]) for unit in scores]
    state = _State(model, limits, losses, np.zeros(len(widths), dtype=np.int64))
    notes: list[str] = []
    round_now, depthwise_now = round_to, depthwise_round_to
    while not _descend(state, [w.removals(round_now, depthwise_now) for w in widths]):
        if round_now == 1 and depthwise_now == 1:
            if _trade(state, [w.removals(1, 1) for w in widths]):
                break
            raise _unreachable(state, widths)
        round_now, depthwise_now = max(round_now // 2, 1), max(depthwise_now // 2, 1)
    if round_now != round_to:
        notes.append(
            f"rounding of the last steps was relaxed from {round_to} to {round_now} channels "
            f"(depthwise from {depthwise_round_to} to {depthwise_now}) to land within 1 %"
        )
    return Solution(state.removed, tuple(notes))


def _descend(state: _State, removals: Sequence[Ints]) -> bool:
    """Take the best steps that do not overshoot until the budget is met; whether it is."""
    while not state.met:
        best: tuple[float, int, int, Floats] | None = None
        for group, allowed in enumerate(removals):
            further = allowed[allowed > state.removed[group]]
            if not further.size:
                continue
            ratio, used = state.step(group, int(further[0]))
            if used.max() < 1 - TOLERANCE:
                continue
            if np.isfinite(ratio) and (best is None or ratio < best[0]):
                best = (ratio, group, int(further[0]), used)
        if best is None:
            return False
        state.take(*best[1:])
    return True


def _trade(state: _State, removals: Sequence[Ints]) -> bool:
    """Take one step that overshoots and give back part of another; whether that lands."""
    best: tuple[float, Ints, Floats] | None = None
    for group, allowed in enumerate(removals):
        further = allowed[allowed > state.removed[group]]
        if not further.size:
            continue
        for other, back in enumerate(removals):
            fewer = back[back < state.removed[other]]
            for count in fewer[-3:] if other != group else ():
                changed = state.removed.copy()
                changed[group], changed[other] = further[0], count
                used = state.usage(changed)
                lost = sum(state.losses[g][c] for g, c in enumerate(changed))
                if 1 - TOLERANCE <= used.max() <= 1 and (best is None or lost < best[0]):
                    best = (lost, changed, used)
    if best is None:
        return _nearest(state, removals)
    state.removed, state.used = best[1], best[2]
    return True


def _nearest(state: _State, removals: Sequence[Ints]) -> bool:
    """Accept one per cent above the limit where single units are coarser than the tolerance."""
    del removals
    return bool(state.used.max() <= 1 + TOLERANCE)


def _unreachable(state: _State, widths: Sequence[Width]) -> BudgetError:
    floor = np.array([width.units - width.least for width in widths], dtype=np.int64)
    least = state.usage(floor)
    names = list(state.limits)
    worst = int(least.argmax())
    name, limit = names[worst], state.limits[names[worst]]
    if least[worst] > 1:
        dense = state.model.quantities(np.zeros_like(floor))[name]
        return BudgetError(
            f"the target of {limit:,.0f} {name} cannot be met: with every removable group at its "
            f"minimum {least[worst] * limit:,.0f} of {dense:,.0f} are left; the rest is in frozen "
            "or protected groups (fxprune inspect names them); lower min-units, raise max-ratio, "
            "unprotect groups, or ask for less"
        )
    return BudgetError(
        f"no combination of whole units lands within {TOLERANCE:.0%} of {limit:,.0f} {name}: the "
        f"nearest found is {state.used[worst] * limit:,.0f}; single units are too large, so choose "
        "a target near that"
    )
