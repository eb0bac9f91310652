"""The rules of all operators, and the function that registers an operator of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxprune.graph import operators
from fxprune.graph.operators import Macs
from fxprune.structure.flow import Rule, Rules
from fxprune.structure.rules import (
    contraction,
    convolution,
    indexing,
    joining,
    movement,
    normalisation,
    padding,
    parts,
    pointwise,
    recurrent,
    scattering,
    spatial,
)
from fxprune.structure.rules.pointwise import pointwise as pointwise_rule
from fxprune.structure.rules.record import OperatorRule, Repair

_OWN: dict[Any, OperatorRule] = {
    **movement.RULES,
    **joining.RULES,
    **padding.RULES,
    **parts.RULES,
    **indexing.RULES,
    **pointwise.RULES,
    **contraction.RULES,
    **convolution.RULES,
    **normalisation.RULES,
    **spatial.RULES,
    **recurrent.RULES,
    **scattering.RULES,
}
_registered: dict[Any, OperatorRule] = {}


def operator_rule(
    target: Any,
    *,
    repair: Repair | None = None,
    macs: Macs | None = None,
    pointwise: bool = False,
    piecewise_linear: bool = False,
    moves_data: bool = False,
    identity: bool = False,
    free: bool = False,
) -> Callable[[Rule], Rule]:
    """Register what is known of an operator, such as ``torch.ops.my.op``, all overloads of it.

    The function that this decorates is its rule, called as ``rule(flow, node)``: it returns the
    ``Labels`` of the node's output, or a list of them, and raises ``NotCovered`` for calls that it
    does not cover. A pointwise operator needs no rule; there a plain call of ``operator_rule``
    registers it. A rule that fails freezes what meets the call, and the group says so.

    Packages can name modules that register operators in the entry-point group
    ``fxprune.operators``. ``examples/custom_rule.py`` registers a complete operator.

    Args:
        target: the operator; what was known of it before is replaced.
        repair: called as ``repair(node, remaining)`` after a removal, to bring sizes in line that
            the operator takes as plain numbers.
        macs: called as ``macs(node)``; returns the products that the operator's
            multiply-accumulates are the sum of, each a tuple of pairs of a node and a dimension.
        pointwise: an element of the result depends on the elements at its place only.
        piecewise_linear: it is linear in each of its operands, or so in pieces.
        moves_data: every element of the result is an element of its one operand, or padding.
        identity: in evaluation the result equals the operand.
        free: a runtime does no work for it.

    """
    record = operators.Operator(
        macs=macs,
        pointwise=pointwise,
        piecewise_linear=piecewise_linear,
        moves_data=moves_data,
        identity=identity,
        free=free,
    )
    operators.register(target, record)
    if pointwise:
        _registered[target] = OperatorRule(pointwise_rule, repair)

    def register(rule: Rule) -> Rule:
        _registered[target] = OperatorRule(rule, repair)
        return rule

    return register


def known_rules() -> Rules:
    """Return the rules of all operators."""
    operators.load_plugins()
    own, registered = (
        {packet: record.rule for packet, record in records.items()}
        for records in (_OWN, _registered)
    )
    return Rules(own, registered, pointwise_rule)


def known_repairs() -> dict[Any, Repair]:
    """Return what brings the literals of an operator in line, for those that have any."""
    operators.load_plugins()
    records = {**_OWN, **_registered}
    return {packet: record.repair for packet, record in records.items() if record.repair}
