"""Remove the planned units from all tensors.

Before:
    conv1.weight 16x3x3x3, bn1.weight 16, conv2.weight 32x16x3x3

After (plan: units 1, 4, 7, 9 of the group of conv1):
    conv1.weight 12x3x3x3, bn1.weight 12, conv2.weight 32x12x3x3

Every parameter dimension that a unit occupies is sliced, and constant sizes in views, splits, pads
and groups are adjusted. The pass records, for later passes, which part of each dense value remains;
only the implants stay in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fxprune.errors import PreconditionError
from fxprune.graph.facts import MASKS, PLAN, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.structure.groups import find_groups
from fxprune.structure.removal import remove_units


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the planned units."""

    name: ClassVar[str] = "remove-channels"
    needs: ClassVar[Facts] = frozenset({PLAN})
    gives: ClassVar[Facts] = frozenset({REMOVED})
    keeps: ClassVar[Facts] = frozenset({MASKS, PLAN})

    def run(self, program: Program, context: Context) -> Outcome:
        """Remove every planned unit; changes counts units."""
        plan = program.get(PLAN)
        groups = {group.name: group for group in find_groups(program, plan.attention)}
        if missing := sorted(set(plan.remove) - set(groups)):
            raise PreconditionError(
                f"the plan names groups that the program does not have: {', '.join(missing[:3])}; "
                "plan again after changing the program"
            )
        removed = remove_units(program, {groups[name]: ids for name, ids in plan.remove.items()})
        implant = {
            name: _renumbered(ids, plan.remove.get(name, ())) for name, ids in plan.implant.items()
        }
        program.put(PLAN, replace(plan, remove={}, implant=implant))
        return Outcome(removed, details={"groups": len(plan.remove)})

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """The plan has nothing left to remove."""
        yield "no planned unit is left", not program.get(PLAN).remove


def _renumbered(units: Sequence[int], removed: Sequence[int]) -> tuple[int, ...]:
    """The numbers of units once others before them are gone."""
    left = np.setdiff1d(units, removed)
    return tuple((left - np.searchsorted(sorted(removed), left)).tolist())
