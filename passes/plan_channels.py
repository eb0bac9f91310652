"""Decide which units go, so that a budget is met at the least sensitivity per cost saved.

Before:
    fact sensitivity: by group, one score per unit

After:
    fact plan: by group, the units to remove

Units of a group go in order of their scores; how many of each group is solved for over all groups
at once, with costs that are exact after every step. What remains is a multiple of 16 where 32 or
more channels remain, of 8 where 16 remain, else of 4. The binding budget is used up to within 1 %;
where no such widths do that, as few groups as possible are rounded less, and the plan says so.
Latency is predicted from layers timed in ONNX Runtime on this host, and what a plan leaves is timed
as a whole and the plan corrected; widths are then multiples of 4, and 2 % of the budget may stay.
Refuses budgets that cannot be met, saying what stops them, and patterns that match nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, get_args

import numpy as np

from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.implants.planning import implant_share, plan_tiers
from fxprune.latency.bench import Bench
from fxprune.latency.plan import bench_for, solve_and_try
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.planning.budget import Name, Target
from fxprune.planning.cost_evaluator import Costs, Ledger, Ledgers
from fxprune.planning.cost_model import cost_model
from fxprune.planning.problem import Problem
from fxprune.planning.ranking import Normalize, cheapest_first, losses
from fxprune.planning.selection import candidates, shares
from fxprune.planning.widths import DEPTHWISE_FLOOR, Rounding, widths
from fxprune.structure.groups import Group, find_groups
from fxprune.structure.merging import Ints
from fxprune.structure.removal import remove_units


@dataclass(frozen=True)
class PlanChannels(Pass):
    """Choose units to remove within a budget; several budgets are all met.

    Attributes:
        macs: what may remain of the dense model's multiply-accumulates: 50%, 2.0x, or 300M.
        params: the same for parameters.
        size: the same for weight bytes: 50%, 2x or 1MB.
        latency: the same for milliseconds per sample in ONNX Runtime on this host: 60% or 1.5ms.
        round_to: channels are a multiple of this where twice as many remain, of half of it where
            as many remain, else of a quarter.
        depthwise_round_to: the same where a depthwise convolution runs; a multiple of 4, as are
            all widths there.
        min_units: units that stay in every group.
        max_ratio: the largest share of units that a group may lose.
        protect: name patterns of tensors, modules or groups that keep their shapes.
        ratios: by name pattern, the share of its units that a group loses, whatever the scores.
        normalize: divide the scores of each group by their mean or maximum first.
        tolerance: the share of its limit that the binding budget may stay below it.
        corrections: how often a plan whose measured latency misses its budget is made anew; at
            zero plans are not measured.
        implant_ratio: the share of each group's cut that gets implants instead; ``auto`` mixes
            removal with layers of low rank as moves the re-fitted model's output least.
        path: how far to go from the dense model to the budget, geometrically; below one in the
            early steps of a schedule.

    """

    macs: float | str | None = None
    params: float | str | None = None
    size: float | str | None = None
    latency: float | str | None = None
    round_to: int = 16
    depthwise_round_to: int = 8
    min_units: int = 1
    max_ratio: float = 0.9
    protect: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    normalize: Normalize = "none"
    tolerance: float = 0.01
    corrections: int = 2
    implant_ratio: float | str = 0.0
    path: float = 1.0

    name: ClassVar[str] = "plan-channels"
    acts: ClassVar[bool] = False
    needs: ClassVar[Facts] = frozenset({SENSITIVITY})
    gives: ClassVar[Facts] = frozenset({PLAN})

    def __post_init__(self) -> None:
        Rounding(self.round_to, self.depthwise_round_to)
        implant_share(self.implant_ratio)
        _ = self.targets
        shares = {"max-ratio": self.max_ratio, "tolerance": self.tolerance, "path": self.path}
        for name, share in {**self.ratios, **shares}.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name} is {share}; it must lie between 0 and 1")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The budget, as targets."""
        given = {name: getattr(self, name) for name in get_args(Name)}
        return tuple(Target.of(name, value) for name, value in given.items() if value is not None)

    def run(self, program: Program, context: Context) -> Outcome:
        """Solve for the budget and record the plan."""
        if not self.targets:
            raise InputError("plan-channels has no budget; give it macs=50%, or another")
        sensitivity = program.get(SENSITIVITY)
        every = find_groups(program, sensitivity.attention)
        groups, skips = candidates(every, sensitivity, self.protect)
        if not groups:
            why = "; ".join(sorted({skip.reason for skip in skips})[:3]) or "there are no groups"
            raise BudgetError(f"nothing may be removed, so no budget can be met: {why}")
        orders = [cheapest_first(sensitivity, group) for group in groups]

        def doomed(removed: Ints) -> dict[Group, list[int]]:
            counts = zip(groups, orders, removed.tolist(), strict=True)
            return {group: sorted(order[:n].tolist()) for group, order, n in counts if n}

        def cut(removed: Ints) -> Program:
            small = program.copy().to("cpu").eval()
            remove_units(small, doomed(removed))
            return small

        timed = None
        with bench_for(self.targets, program, context) as bench:
            problem = self._problem(program, context, groups, sensitivity, bench)
            if self.implant_ratio:
                plan, found = plan_tiers(program, context, groups, problem, sensitivity, self)
            else:
                found, timed = solve_and_try(problem, bench, cut, self.corrections)
                plan = Plan({g.name: tuple(units) for g, units in doomed(found.removed).items()})
        predicted = dict(zip(problem.costs.quantities, found.values.tolist(), strict=True))
        plan = replace(plan, notes=found.notes, predicted=predicted)
        program.put(PLAN, replace(plan, attention=sensitivity.attention))
        details = {
            "notes": list(found.notes),
            "predicted": predicted,
            "limits": dict(zip(predicted, problem.limits.tolist(), strict=True)),
            "units": sum(map(len, plan.remove.values())),
            "implants": dict(plan.kinds),
            "sensitivity_spent": found.loss,
            "latency": timed,
        }
        return Outcome(0, skips, details)

    def _problem(
        self, program: Program, context: Context, groups: list[Group],
        sensitivity: Sensitivity, bench: Bench | None,
    ) -> Problem:  # fmt: skip
        dense: dict[str, float] = asdict(cost(context.dense or program))
        static = [target.quantity for target in self.targets if target.name != "latency"]
        costs: list[Costs] = [Ledger.of(cost_model(program, groups), static)] if static else []
        if bench is not None:
            costs, dense["latency_ms"] = [*costs, bench.ledger(program, groups)], bench.dense_ms
        limits = [
            whole * (target.limit(whole) / whole) ** self.path
            for target in self.targets
            for whole in [dense[target.quantity]]
        ]
        # Kernels are several times slower at other widths, and the table of latencies lacks them.
        floor = 1 if bench is None else DEPTHWISE_FLOOR
        roundings = Rounding(self.round_to, self.depthwise_round_to, floor).ladder()
        fixed = shares(self.ratios, groups)
        found = widths(program, groups)
        levels = [
            tuple(
                width.choices(rounding, self.min_units, self.max_ratio, fixed.get(group.name))
                for group, width in zip(groups, found, strict=True)
            )
            for rounding in roundings
        ]
        spent = tuple(losses(sensitivity, group, self.normalize) for group in groups)
        return Problem(
            tuple(group.name for group in groups), Ledgers(tuple(costs)), np.array(limits), spent,
            tuple(levels), tuple(str(rounding.dense) for rounding in roundings), self.tolerance,
        )  # fmt: skip
