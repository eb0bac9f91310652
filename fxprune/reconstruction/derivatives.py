"""Whether a region can be linearised, tested on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program
from fxprune.reconstruction.lookahead import Curvature, Lookahead, variables
from fxprune.reconstruction.region import Region

# PyTorch raises these where an operator has no (second) derivative or no shape rule.
MISSING_DERIVATIVE = (RuntimeError, NotImplementedError)


class Linearisable:
    """Tells which regions have the derivatives that lookahead needs.

    Args:
        program: the program that the regions are part of.
        curvature: the curvature that lookahead uses.

    """

    def __init__(self, program: Program, curvature: Curvature) -> None:
        self._program, self._curvature = program, curvature
        self._known: dict[Any, str | None] = {}

    def form(self, region: Region) -> tuple[Region, str | None]:
        """Return the region in a form that can be linearised, or the reason why there is none.

        Operators without a second derivative are replaced by PyTorch's decomposition of them, if
        there is one.
        """
        reason = self._obstacle(region)
        if reason is None:
            return region, None
        forms: dict[fx.Node, Callable[..., Any]] = {}
        for node in region.nodes:
            target: Any = node.target
            form = decomposition_table.get(target)
            if form is None or _twice_differentiable(node, target):
                continue
            if _twice_differentiable(node, form):
                forms[node] = form
        decomposed = replace(region, forms=forms)
        if forms and self._obstacle(decomposed) is None:
            return decomposed, None
        return region, reason

    def _obstacle(self, region: Region) -> str | None:
        nodes = tuple((str(node.target), str(node.meta.get("val"))) for node in region.nodes)
        key = (*nodes, len(region.forms), len(region.outputs))
        if key not in self._known:  # repeated blocks have equal regions
            self._known[key] = self._try(region)
        return self._known[key]

    def _try(self, region: Region) -> str | None:
        try:
            with without_data(self._program, region) as (task, point):
                task.product(0, point, self._curvature)(point)
        except MISSING_DERIVATIVE as error:
            return str(error).strip().split("\n")[0] or type(error).__name__
        return None


@contextmanager
def without_data(
    program: Program, region: Region
) -> Iterator[tuple[Lookahead, tuple[Tensor, ...]]]:
    """Yield the lookahead problem of a region on fake tensors, and its starting point."""
    values = set(region.nodes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sources = {source for node in region.nodes for source in node.all_input_nodes}
        stored = {
            str(node.target): torch.empty_like(program.tensor(str(node.target)))
            for node in sources
            if node.op == "get_attr"
        }
        frontier = {node: _empty(node) for node in sources - values if node.op != "get_attr"}
        batch = frontier, [_empty(node) for node in region.outputs]
        names = variables(program, region)
        task = Lookahead(program, region, names, (None,) * len(names), lambda _: batch, stored)
        yield task, tuple(stored[name] for name in names)


def _empty(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return torch.empty_like(value) if isinstance(value, Tensor) else value


def _twice_differentiable(node: fx.Node, call: Any) -> bool:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        args, keywords = fx.map_arg((node.args, node.kwargs), _leaf)
        leaves = [
            leaf
            for leaf in pytree.tree_leaves((args, keywords))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        try:
            made = [
                leaf
                for leaf in pytree.tree_leaves(call(*args, **keywords))
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            if made:
                probes = [torch.zeros_like(leaf, requires_grad=True) for leaf in made]
                options: Any = {"allow_unused": True, "materialize_grads": True}
                first = torch.autograd.grad(made, leaves, probes, create_graph=True, **options)
                slopes = [leaf for leaf in first if leaf.requires_grad]
                torch.autograd.grad(slopes, probes, [part.detach() for part in slopes], **options)
        except MISSING_DERIVATIVE:
            return False
    return True


def _leaf(node: fx.Node) -> Any:
    value = _empty(node)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.requires_grad_()
    return value
