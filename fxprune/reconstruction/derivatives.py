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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program
from fxprune.reconstruction.lookahead import Lookahead, variables
from fxprune.reconstruction.region import Region

# PyTorch raises these where an operator has no (second) derivative or no shape rule.
MISSING_DERIVATIVE = (RuntimeError, NotImplementedError)


class Linearisable:
    """Tells which regions have the derivatives that lookahead needs."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any] | None, str | None]] = {}

    def form(self, region: Region) -> tuple[Region, str | None]:
        """Return the region in a form that can be linearised, or the reason why there is none.

        Operators without a second derivative are replaced by PyTorch's decomposition of them, if
        there is one.
        """
        forms = {}
        for node in region.nodes:
            form, obstacle = self._of(node)
            if obstacle is not None:
                return region, obstacle
            if form is not None:
                forms[node] = form
        return (replace(region, forms=forms) if forms else region), None

    def _of(self, node: fx.Node) -> tuple[Callable[..., Any] | None, str | None]:
        """What to call instead of a node's operator, and why that cannot be differentiated."""
        types = [str(getattr(one.meta.get("val"), "dtype", "")) for one in node.all_input_nodes]
        key = (str(node.target), *types)  # one call of an operator is as good as another
        if key not in self._known:
            target: Any = node.target
            obstacle, form = _missing(node, target), decomposition_table.get(target)
            if obstacle is None:
                form = None
            elif form is not None and _missing(node, form) is None:
                obstacle = None
            self._known[key] = form, obstacle
        return self._known[key]


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


def _missing(node: fx.Node, call: Any) -> str | None:
    """Why a call on a node's inputs cannot be differentiated twice, if so."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        args, keywords = fx.map_arg((node.args, node.kwargs), _leaf)
        leaves = _with_gradients((args, keywords))
        try:
            with sdpa_kernel(SDPBackend.MATH):
                made = _with_gradients(call(*args, **keywords))
            if made:
                probes = [torch.zeros_like(leaf, requires_grad=True) for leaf in made]
                options: Any = {"allow_unused": True, "materialize_grads": True}
                first = torch.autograd.grad(made, leaves, probes, create_graph=True, **options)
                slopes = _with_gradients(first)
                if slopes:
                    seeds = [part.detach() for part in slopes]
                    torch.autograd.grad(slopes, probes, seeds, **options)
        except MISSING_DERIVATIVE as error:
            return str(error).strip().split("\n")[0] or type(error).__name__
    return None


def _with_gradients(values: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _leaf(node: fx.Node) -> Any:
    value = _empty(node)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.requires_grad_()
    return value
