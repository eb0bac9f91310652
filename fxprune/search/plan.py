"""A plan for a whole network: which residual branches and which units are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxprune.errors import InputError
from fxprune.graph.facts import Preference
from fxprune.graph.program import Program
from fxprune.structure.branches import Branch, find_branches, remove_branch
from fxprune.structure.groups import find_groups
from fxprune.structure.removal import remove_units


@dataclass(frozen=True)
class NetworkPlan:
    """What is removed from a dense program.

    Attributes:
        branches: residual branches, as ``branch_id`` names them.
        units: by name of a group of the dense program, the numbers of the units, ascending.
        attention: the factor of attention widths that the groups were found for.

    """

    branches: tuple[str, ...] = ()
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attention: Preference = "heads"


def branch_id(branch: Branch) -> str:
    """Return a name of a branch that stays the same while other parts are removed."""
    return f"{branch.add.name}:{branch.end.name}"


def carry_out(program: Program, plan: NetworkPlan) -> int:
    """Remove what a plan names from its dense program, in place; returns how many units.

    Raises:
        InputError: the program does not have what the plan names.

    """
    groups = {group.name: group for group in find_groups(program, plan.attention)}
    _check_known("groups", plan.units, groups)
    removed = remove_units(program, {groups[name]: units for name, units in plan.units.items()})
    for name in plan.branches:
        branches = {branch_id(branch): branch for branch in find_branches(program)}
        _check_known("residual branches", [name], branches)
        remove_branch(program, branches[name])
    return removed


def _check_known(
    what: str, names: Sequence[str] | Mapping[str, object], known: Mapping[str, object]
) -> None:
    if missing := sorted(set(names) - set(known)):
        raise InputError(
            f"the plan removes {what} that the program does not have: {', '.join(missing[:3])}; "
            "the plan was made for another model, or by another version of PyTorch"
        )
