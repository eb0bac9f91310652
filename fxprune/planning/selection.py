"""Name patterns: which groups a user means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from fxprune.errors import InputError
from fxprune.graph.facts import Sensitivity
from fxprune.pipeline.contract import Skip
from fxprune.structure.groups import Group


def names_of(group: Group) -> tuple[str, ...]:
    """Return what a group answers to: its own name, its slots, their tensors and modules."""
    found = [group.name]
    for slot in group.slots:
        found += [str(slot), slot.tensor, slot.tensor.rpartition(".")[0]]
    return tuple(dict.fromkeys(filter(None, found)))


def selected(pattern: str, groups: Sequence[Group]) -> frozenset[str]:
    """Return the names of the groups that a pattern with ``*``, ``?`` and ``[]`` matches.

    Raises:
        InputError: it matches none; the message names the nearest.

    """
    found = frozenset(
        group.name
        for group in groups
        if any(fnmatchcase(name, pattern) for name in names_of(group))
    )
    if not found:
        raise InputError(f"no group matches '{pattern}'{_nearest(pattern, groups)}")
    return found


def selected_by_any(patterns: Iterable[str], groups: Sequence[Group]) -> frozenset[str]:
    """Return the names of the groups that at least one pattern matches."""
    return frozenset[str]().union(*(selected(pattern, groups) for pattern in patterns))


def shares(ratios: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """Return the numbers that patterns give to groups, by group name; the first pattern counts."""
    pairs = [(selected(pattern, groups), ratio) for pattern, ratio in ratios.items()]
    return {name: ratio for names, ratio in reversed(pairs) for name in names}


def _nearest(pattern: str, groups: Sequence[Group]) -> str:
    names = list(dict.fromkeys(name for group in groups for name in names_of(group)))
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {', '.join(names[:3])}, ..." if names else "; the program has no groups"


def candidates(
    groups: Sequence[Group], sensitivity: Sensitivity, protect: Sequence[str]
) -> tuple[list[Group], tuple[Skip, ...]]:
    """Return the groups that may lose units, and why the others may not.

    Args:
        groups: all of a program.
        sensitivity: of their units.
        protect: name patterns of tensors, modules or groups that keep their shapes.

    """
    protected = selected_by_any(protect, groups)
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
