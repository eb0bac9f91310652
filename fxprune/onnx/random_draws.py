"""Programs that draw random numbers, compared with ONNX Runtime on fixed draws."""

from __future__ import annotations

import torch
from torch import fx

from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, replace_node

aten = torch.ops.aten
DRAW = 0.5  # what takes the place of a draw while the runtimes are compared
LIKE = frozenset({"rand_like", "randn_like", "normal_functional"})
SIZED = frozenset({"rand", "randn"})
OTHERS = frozenset({
    "bernoulli", "randint", "randint_like", "randperm", "normal", "multinomial", "poisson",
    "exponential", "uniform", "geometric", "log_normal", "cauchy",
})  # fmt: skip


def draws(program: Program) -> tuple[fx.Node, ...]:
    """Return the nodes that draw random numbers in evaluation mode."""
    return tuple(node for node in program.graph.nodes if _name(node) in LIKE | SIZED | OTHERS)


def with_fixed_draws(program: Program) -> Program | None:
    """Return a copy in which every draw is a constant; None for draws that cannot be replaced."""
    copy = program.copy()
    for node in draws(copy):
        if _name(node) in LIKE:
            args, target = (node.args[0], DRAW), aten.full_like.default
            kwargs = {}
        elif _name(node) in SIZED:
            args, target = (node.args[0], DRAW), aten.full.default
            kwargs = {"dtype": node.meta["val"].dtype}
        else:
            return None
        replace_node(copy, node, insert_call(copy, node, target, args, kwargs))
    copy.refresh()
    return copy


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", "")).removesuffix("_")
