"""Decide which units go, so that a budget is met at the least sensitivity.

Before:
    fact sensitivity: by group, one score per unit

After:
    fact plan: by group, the units to remove

Units of a group go in order of their score. Groups compete by sensitivity per cost saved, in steps
of the rounding; the end lands within 1 % of the budget, if need be at finer rounding, which the
plan then says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np

from fxprune.budget import Target
from fxprune.context import Context
from fxprune.cost import Quantity, cost, cost_model
from fxprune.errors import InputError
from fxprune.facts import PLAN, SENSITIVITY, Plan, Sensitivity
from fxprune.groups import Group, find_groups
from fxprune.pipeline import Facts, Outcome, Pass, Skip
from fxprune.program import Program
from fxprune.solver import Floats, solve
from fxprune.widths import widths

Normalize = Literal["none", "group-mean", "group-max"]


@dataclass(frozen=True)
class PlanChannels(Pass):
    """Choose units to remove within a budget.

    Attributes:
        macs: what may remain of the dense model's multiply-accumulates: 50%, 2.0x, or a number.
        params: the same for parameters.
        size: the same for weight bytes; also 1MB.
        round_to: channels are a multiple of this where twice as many remain, of half of it where
            as many remain, else of a quarter.
        depthwise_round_to: the same where a depthwise convolution runs, never below 4.
        min_units: units that stay in every group.
        max_ratio: the largest share of units that a group may lose.
        protect: name globs of groups that stay whole; they match the group's name or any slot's.
        ratios: by name glob, a largest share of its own.
        normalize: divide the scores of each group by their mean or maximum first.

    """

    macs: str | float | None = None
    params: str | float | None = None
    size: str | float | None = None
    round_to: int = 16
    depthwise_round_to: int = 8
    min_units: int = 1
    max_ratio: float = 0.9
    protect: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    normalize: Normalize = "none"

    name: ClassVar[str] = "plan-channels"
    acts: ClassVar[bool] = False
    needs: ClassVar[Facts] = frozenset({SENSITIVITY})
    gives: ClassVar[Facts] = frozenset({PLAN})

    @property
    def targets(self) -> tuple[Target, ...]:
        """The budget, as targets."""
        given = {"macs": self.macs, "params": self.params, "size": self.size}
        return tuple(
            Target.parse(f"{name}={value}") for name, value in given.items() if value is not None
        )

    def run(self, program: Program, context: Context) -> Outcome:
        """Solve for the budget and record the plan."""
        if not self.targets:
            raise InputError("plan-channels has no budget; give it macs=, params= or size=")
        sensitivity = program.get(SENSITIVITY)
        groups, ratios, skips = self._candidates(find_groups(program), sensitivity)
        dense = context.dense or program
        names: dict[str, Quantity] = {"macs": "macs", "params": "params", "size": "weight_bytes"}
        limits = {names[t.quantity]: t.absolute(cost(dense)) for t in self.targets}
        model = cost_model(program, groups)
        scores = [self._scores(sensitivity, group) for group in groups]
        width = widths(program, groups, self.min_units, ratios)
        found = solve(model, scores, width, limits, self.round_to, self.depthwise_round_to)
        remove = {
            group.name: tuple(sorted(np.argsort(score, kind="stable")[:count].tolist()))
            for group, score, count in zip(groups, scores, found.removed, strict=True)
            if count
        }
        predicted = {str(name): value for name, value in model.quantities(found.removed).items()}
        program.put(PLAN, Plan(remove, notes=found.notes, predicted=predicted))
        details = {"notes": list(found.notes), "predicted": predicted}
        return Outcome(0, skips, details)

    def _candidates(
        self, groups: tuple[Group, ...], sensitivity: Sensitivity
    ) -> tuple[list[Group], list[float], tuple[Skip, ...]]:
        chosen, ratios, skips = [], [], []
        for group in groups:
            ratio = self._ratio(group)
            if group.frozen_because is not None:
                skips.append(Skip(group.name, group.frozen_because))
            elif ratio <= 0:
                skips.append(Skip(group.name, "protected by the user"))
            elif group.name not in sensitivity.scores:
                skips.append(Skip(group.name, f"no {sensitivity.criterion} score"))
            elif len(group.units) > 1:
                chosen.append(group)
                ratios.append(ratio)
        return chosen, ratios, tuple(skips)

    def _ratio(self, group: Group) -> float:
        names = [group.name, *(slot.tensor for slot in group.slots)]
        if any(fnmatchcase(name, glob) for glob in self.protect for name in names):
            return 0.0
        own = [
            ratio
            for glob, ratio in self.ratios.items()
            if any(fnmatchcase(name, glob) for name in names)
        ]
        return min(own, default=self.max_ratio)

    def _scores(self, sensitivity: Sensitivity, group: Group) -> Floats:
        scores: Floats = sensitivity.scores[group.name].double().cpu().numpy()
        match self.normalize:
            case "group-mean":
                return scores / max(float(np.abs(scores).mean()), 1e-300)
            case "group-max":
                return scores / max(float(np.abs(scores).max()), 1e-300)
        return scores
