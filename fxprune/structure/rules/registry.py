"""What fxprune knows of operators: one rule per family, and a place to register others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fxprune.structure.flow import Rule
from fxprune.structure.rules import (
    contraction,
    convolution,
    indexing,
    movement,
    normalisation,
    parts,
    pointwise,
    spatial,
)
from fxprune.structure.rules.repair import REPAIRS, Repair

_registered: dict[Any, Rule] = {}
_repairs: dict[Any, Repair] = {}


def operator_rule(target: Any, *, repair: Repair | None = None) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of an operator, such as ``torch.ops.my.op``.

    The rule is called as ``rule(flow, node)`` and returns the ``Labels`` of the node's output, or
    a list of them. Packages can do the same through the entry-point groups ``fxprune.rules`` and
    ``fxprune.repairs``, whose entries name mappings from operators to rules and to repairs.
    ``examples/custom_rule.py`` shows one.

    Args:
        target: the operator, all overloads of it.
        repair: called as ``repair(node, remains)`` after a removal, to bring sizes in line that
            the operator takes as plain numbers.

    """

    def register(rule: Rule) -> Rule:
        _registered[target] = rule
        if repair is not None:
            _repairs[target] = repair
        return rule

    return register


@functools.cache
def _installed(group: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for entry in entry_points(group=group):
        found.update(entry.load())
    return found


def known_repairs() -> dict[Any, Repair]:
    """Return what brings the literals of an operator in line, for those that have any."""
    return {**REPAIRS, **_installed("fxprune.repairs"), **_repairs}


def known_rules() -> dict[Any, Rule]:
    """Return the rule of every known operator; registered ones take precedence."""
    return {
        **movement.RULES,
        **parts.RULES,
        **indexing.RULES,
        **pointwise.RULES,
        **contraction.RULES,
        **convolution.RULES,
        **normalisation.RULES,
        **spatial.RULES,
        **_installed("fxprune.rules"),
        **_registered,
    }
