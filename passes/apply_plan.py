"""Remove the residual branches and the units that a plan for the whole network names.

Before:
    conv1.weight 16x3x3x3, add = x + block(x)

After (units 1, 4, 7, 9 of the group of conv1; branch add):
    conv1.weight 12x3x3x3, x

The search behind ``--max-drop``, ``--frontier`` and latency targets makes such plans, and recipes
repeat them. The plan names groups, units and additions of the dense program. Units are removed
first, then branches. The result computes what the dense program does with the removed parts set to
zero; run the passes that restore accuracy afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fxprune.graph.facts import MASKS, REMOVED, Preference
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.search.plan import NetworkPlan, branch_id, carry_out
from fxprune.structure.branches import find_branches


@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Carry out a plan for the whole network.

    Attributes:
        branches: the residual branches to remove, each as ADDITION:END, the names of two nodes.
        units: for each group, the numbers of the units to remove.
        attention: remove whole heads, or narrow every head (heads or head_dim); as in the search
            that made the plan.

    """

    branches: tuple[str, ...] = ()
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attention: Preference = "heads"

    name: ClassVar[str] = "apply-plan"
    keeps: ClassVar[Facts] = frozenset({MASKS, REMOVED})
    repeats: ClassVar[str | None] = "the plan's numbers are units of the program it was made for"

    @property
    def plan(self) -> NetworkPlan:
        """The plan."""
        return NetworkPlan(self.branches, self.units, self.attention)

    def run(self, program: Program, context: Context) -> Outcome:
        """Remove; changes counts units and branches."""
        units = carry_out(program, self.plan)
        details = {"units": units, "branches": len(self.branches)}
        return Outcome(units + len(self.branches), details=details)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """No removed branch is left."""
        left = {branch_id(branch) for branch in find_branches(program)}
        yield "none of the branches is left", left.isdisjoint(self.branches)
