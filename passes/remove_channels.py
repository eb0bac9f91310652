"""Make the physical cut that the plan asks for.

Before:
    conv1.weight 16x3x3x3, bn1.weight 16, conv2.weight 32x16x3x3

After (plan: units 1, 4, 7, 9 of the group of conv1):
    conv1.weight 12x3x3x3, bn1.weight 12, conv2.weight 32x12x3x3

Every parameter dimension that a unit occupies is sliced, and sizes that the trace baked into views,
splits, paddings and groups follow. What is left of each dense value is recorded for later passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.context import Context
from fxprune.errors import PreconditionError
from fxprune.facts import PLAN, REMOVED
from fxprune.groups import find_groups
from fxprune.pipeline import Facts, Outcome, Pass
from fxprune.program import Program
from fxprune.removal import remove_units


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the planned units."""

    name: ClassVar[str] = "remove-channels"
    needs: ClassVar[Facts] = frozenset({PLAN})
    gives: ClassVar[Facts] = frozenset({REMOVED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Remove every planned unit; changes counts units."""
        groups = {group.name: group for group in find_groups(program)}
        plan = program.get(PLAN)
        if missing := sorted(set(plan.remove) - set(groups)):
            raise PreconditionError(
                f"the plan names groups that the program does not have: {', '.join(missing[:3])}; "
                "plan again after changing the program"
            )
        removed = remove_units(program, {groups[name]: ids for name, ids in plan.remove.items()})
        return Outcome(removed, details={"groups": len(plan.remove)})
