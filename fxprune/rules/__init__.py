"""What fxprune knows of operators: one rule per family, and a place to register others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fxprune.flow import Rule
from fxprune.rules import (
    contraction,
    convolution,
    indexing,
    movement,
    normalisation,
    pointwise,
    spatial,
)

_registered: dict[Any, Rule] = {}


def operator_rule(target: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of an operator, such as ``torch.ops.my.op``.

    The rule is called as ``rule(flow, node)`` and returns the ``Labels`` of the node's output, or
    a list of them. Packages can do the same through the entry-point group ``fxprune.rules``, whose
    entries name a mapping from operators to rules.
    """

    def register(rule: Rule) -> Rule:
        _registered[target] = rule
        return rule

    return register


@functools.cache
def _installed() -> dict[Any, Rule]:
    found: dict[Any, Rule] = {}
    for entry in entry_points(group="fxprune.rules"):
        found.update(entry.load())
    return found


def known_rules() -> dict[Any, Rule]:
    """Return the rule of every known operator; registered ones take precedence."""
    return {
        **movement.RULES,
        **indexing.RULES,
        **pointwise.RULES,
        **contraction.RULES,
        **convolution.RULES,
        **normalisation.RULES,
        **spatial.RULES,
        **_installed(),
        **_registered,
    }
