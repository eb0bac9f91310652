"""Which groups may lose units, by their scores and by what the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxprune.errors import BudgetError
from fxprune.graph.facts import Sensitivity
from fxprune.graph.program import Program
from fxprune.pipeline.contract import Skip
from fxprune.pipeline.patterns import names_of_tensor, select, select_any
from fxprune.structure.groups import Group, find_groups


def names_of(group: Group) -> tuple[str, ...]:
    """Return what a group answers to: its own name, its slots, their tensors and modules."""
    found = [group.name]
    for slot in group.slots:
        found += [str(slot), *names_of_tensor(slot.tensor)]
    return tuple(dict.fromkeys(found))


def _by_name(groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    return {group.name: names_of(group) for group in groups}


def shares(ratios: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """Return the numbers that patterns give to groups, by group name; the first pattern counts."""
    found = select(ratios, _by_name(groups), "plan-channels{ratios}", "group")
    return {name: ratios[pattern] for pattern, names in reversed(found.items()) for name in names}


def candidates(
    groups: Sequence[Group], sensitivity: Sensitivity, protect: Sequence[str]
) -> tuple[list[Group], tuple[Skip, ...]]:
    """Return the groups that may lose units, and why the others may not.

    Args:
        groups: all of a program.
        sensitivity: of their units.
        protect: name patterns of tensors, modules or groups that keep their shapes.

    """
    protected = select_any(protect, _by_name(groups), "plan-channels{protect}", "group")
    chosen, skips = [], []
    for group in groups:
        if group.frozen_because is not None:
            skips.append(Skip(group.name, group.frozen_because))
        elif group.name in protected:
            skips.append(Skip(group.name, "protected by the user"))
        elif group.name not in sensitivity.scores:
            skips.append(Skip(group.name, f"no {sensitivity.criterion} score"))
        elif len(group.units) > 1:
            chosen.append(group)
    return chosen, tuple(skips)


def eligible(
    program: Program, sensitivity: Sensitivity, protect: Sequence[str]
) -> tuple[list[Group], tuple[Skip, ...]]:
    """Find a program's groups, and return those that may lose units; see ``candidates``.

    Raises:
        BudgetError: there is none, so that no budget can be met.

    """
    groups, skips = candidates(find_groups(program, sensitivity.attention), sensitivity, protect)
    if not groups:
        why = "; ".join(sorted({skip.reason for skip in skips})[:3]) or "there are no groups"
        raise BudgetError(f"no unit can be removed, so no budget can be met: {why}")
    return groups, skips
