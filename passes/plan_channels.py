"""Choose the units to remove: meet the budget with the least sensitivity per cost saved.

Before:
    fact sensitivity: for each group, one score per unit

After:
    fact plan: for each group, the units to remove

Within a group, units with lower scores are removed first. The number of units to remove from each
group is solved for all groups together, and costs are computed exactly after every step. Widths are
whole steps of this host's kernels if at least two steps remain, else half steps. The binding
budget is used up to within 1 %; if no rounded widths achieve this, as few groups as possible are
rounded less, and the plan says so. Latency is predicted from layers timed in ONNX Runtime on this
host; then the planned model is timed as a whole, and the plan is corrected. With a latency budget
all widths are multiples of 4, and up to 2 % of the budget may stay unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, get_args

import numpy as np

from fxprune.errors import InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.implants.planning import implant_share, plan_tiers
from fxprune.latency.bench import Bench
from fxprune.latency.plan import latency_bench, solve_and_try
from fxprune.latency.stairs import rounding_for
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.planning.budget import Name, Target
from fxprune.planning.cost_evaluator import Costs, Ledger, Ledgers
from fxprune.planning.cost_model import cost_model
from fxprune.planning.problem import Problem
from fxprune.planning.ranking import Normalize, cheapest_first, losses
from fxprune.planning.selection import eligible, shares
from fxprune.planning.solver import solve
from fxprune.planning.widths import DEPTHWISE_FLOOR, Rounding, widths
from fxprune.structure.groups import Group
from fxprune.structure.merging import Ints
from fxprune.structure.removal import remove_units


@dataclass(frozen=True)
class PlanChannels(Pass):
    """Choose the units to remove so that every given budget is met.

    Attributes:
        macs: budget of multiply-accumulates per sample: a share of the dense model (50%), a
            factor (2x) or a number (300M).
        params: budget of parameters: 50%, 2x or 5M.
        size: budget of weight bytes: 50%, 2x or 1MB.
        latency: budget of latency per sample in ONNX Runtime on this host: 60%, 2x or 1.5ms.
        round_to: widths are multiples of N if at least 2N remain, of N/2 if at least N remain,
            else of N/4 (default: twice the number of channels in whose steps the kernels of this
            host take time, by the latency table: 32 with AVX-512).
        depthwise_round_to: the same, for groups with a depthwise convolution; it must be a multiple
            of 4, and so are all widths there.
        min_units: smallest number of units that stay in every group.
        max_ratio: largest fraction of its units that a group may lose.
        protect: name patterns of tensors, modules or groups that keep their shapes.
        ratios: fraction of units to remove from the groups that a name pattern matches, whatever
            their scores.
        normalize: divide the scores of each group by their mean or maximum first.
        tolerance: how far below its limit the binding budget may end, as a fraction.
        corrections: how many times to re-plan when the measured latency misses the target; 0
            disables measuring.
        implant_ratio: fraction of each group's removed units that get implants instead; ``auto``
            mixes removal and low-rank layers so that the output of the re-fitted model moves least.
        path: how far to go from the dense model to the budget, on a geometric scale; less than 1
            in the early rounds of a schedule.

    """

    macs: float | str | None = None
    params: float | str | None = None
    size: float | str | None = None
    latency: float | str | None = None
    round_to: int | None = None
    depthwise_round_to: int | None = None
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
        given = {"dense": self.round_to, "depthwise": self.depthwise_round_to}
        Rounding(**{name: value for name, value in given.items() if value is not None})
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
            raise InputError("plan-channels has no budget; give, for example, macs=50%")
        sensitivity = program.get(SENSITIVITY)
        groups, skips = eligible(program, sensitivity, self.protect)
        orders = [cheapest_first(sensitivity, group) for group in groups]

        def to_remove(removed: Ints) -> dict[Group, list[int]]:
            counts = zip(groups, orders, removed.tolist(), strict=True)
            return {group: sorted(order[:n].tolist()) for group, order, n in counts if n}

        def cut(removed: Ints) -> Program:
            small = program.copy().to("cpu").eval()
            remove_units(small, to_remove(removed))
            return small

        timed, plan = None, None
        by_latency = any(target.name == "latency" for target in self.targets)
        with latency_bench(program, context) if by_latency else nullcontext() as bench:
            problem = self._problem(program, context, groups, sensitivity, bench)
            if self.implant_ratio:
                step = rounding_for(self.round_to, self.depthwise_round_to, 1, context)
                plan, found = plan_tiers(program, context, groups, problem, sensitivity, self, step)
            elif bench is None:
                found = solve(problem)
            else:
                found, timed = solve_and_try(problem, bench, cut, self.corrections)
        if plan is None:
            plan = Plan({g.name: tuple(units) for g, units in to_remove(found.removed).items()})
        predicted = dict(zip(problem.costs.quantities, found.values.tolist(), strict=True))
        plan = replace(plan, notes=found.notes, predicted=predicted)
        program.put(PLAN, replace(plan, attention=sensitivity.attention))
        details = {
            "limits": dict(zip(predicted, problem.limits.tolist(), strict=True)),
            "implants": dict(plan.kinds),
            "sensitivity_spent": found.loss,
            "latency": timed,
        }
        return Outcome(0, skips, details, found.notes, predicted=predicted)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Every unit is planned for once."""
        plan = program.get(PLAN)
        both = [set(units) & set(plan.implant.get(name, ())) for name, units in plan.remove.items()]
        once = all(list(units) == sorted(set(units)) for units in plan.remove.values())
        yield "the units of every group are listed once, in ascending order", once
        yield "no unit is both removed and replaced", not any(both)

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
        rounding = rounding_for(self.round_to, self.depthwise_round_to, floor, context)
        roundings = rounding.ladder()
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
