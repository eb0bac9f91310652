"""Passes of fxprune inside ``torch.fx``'s PassManager, and plain functions inside a pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult  # noqa: TID251  # the one place that may

from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome, Pass

GraphPass = Callable[..., PassResult | None]  # as PassManager's own annotations have it
GraphFunction = Callable[[fx.GraphModule], fx.GraphModule | PassResult | int | None]


def as_fx_pass(
    step: Pass, context: Context | None = None, *, like: Program | None = None
) -> GraphPass:
    """Make a pass one that ``torch.fx.passes.infra.pass_manager.PassManager`` runs.

    Args:
        step: a pass, run with all its checks; facts do not travel from one to the next unless
            both are made ``like`` the same program.
        context: what the pass may use.
        like: a program of the same inputs, whose facts are shared; by default the example inputs
            are zeros of the recorded shapes, and the batch is taken to be fixed.

    """
    given = context or Context()

    def run(graph_module: fx.GraphModule) -> PassResult:
        program = _program(graph_module, like)
        outcome = step(program, given)
        if like is not None:
            like.facts = program.facts
        return PassResult(program.graph_module, outcome.changes > 0)

    run.__name__ = step.name.replace("-", "_")
    return run


def _program(graph_module: fx.GraphModule, like: Program | None) -> Program:
    if like is not None:
        return Program(graph_module, like.example_inputs, like.dynamic, like.facts)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if not isinstance(node.meta.get("val"), Tensor):
            raise InputError(
                f"the input {node.name} has no recorded shape; trace the model with fxprune.trace, "
                "or pass its program as like="
            )
    values = [node.meta["val"] for node in placeholders]
    inputs = tuple(torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in values)
    return Program(graph_module, inputs)


def from_function(function: GraphFunction, name: str | None = None) -> Pass:
    """Make a function on a graph module a pass, which the driver verifies like any other.

    Args:
        function: edits the graph module in place, or returns another, or a ``PassResult``. A number
            it returns is taken for the changes made; else the nodes that came, went or differ are
            counted, so that one that changes tensors alone has to return a number. Values that
            stay must keep their shapes.
        name: what reports and messages call it; by default the function's name.

    >>> import fxprune
    >>> def gelu_for_relu(module: fx.GraphModule) -> None:
    ...     for node in module.graph.nodes:
    ...         if node.target is torch.ops.aten.relu.default:
    ...             node.target = torch.ops.aten.gelu.default
    >>> step = from_function(gelu_for_relu)
    >>> program = fxprune.trace(torch.nn.ReLU(), (torch.randn(2, 3),))
    >>> step(program, Context()).changes, str(step)
    (1, 'gelu-for-relu')

    """
    wanted = name or str(getattr(function, "__name__", "function"))
    called = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")

    @dataclass(frozen=True)
    class FunctionPass(Pass):
        name: ClassVar[str] = called

        def run(self, program: Program, context: Context) -> Outcome:
            before = _lines(program.graph)
            result = function(program.graph_module)
            if isinstance(result, int):
                return Outcome(int(result))
            if isinstance(result, PassResult):
                program.graph_module = result.graph_module
                return Outcome(int(result.modified))
            if isinstance(result, fx.GraphModule):
                program.graph_module = result
            after = _lines(program.graph)
            names = before.keys() | after.keys()
            return Outcome(sum(before.get(name) != after.get(name) for name in names))

    return FunctionPass()


def _lines(graph: fx.Graph) -> dict[str, str]:
    return {node.name: str(node.format_node()) for node in graph.nodes}
