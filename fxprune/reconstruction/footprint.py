"""How much memory a region's activations take, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program
from fxprune.reconstruction.incremental_run import Values
from fxprune.reconstruction.lookahead import Curvature, Lookahead, variables
from fxprune.reconstruction.region import Region

MARGIN = 2.5  # over what is kept, for what products with it and the allocator need besides


def per_sample(
    program: Program, regions: Iterable[Region], curvature: Curvature | None = None
) -> int:
    """Return how many bytes a sample takes in the largest of some regions.

    Args:
        program: what they are part of.
        regions: parts of it.
        curvature: what is linearised there; None if values are only computed.

    """
    leaves = pytree.tree_leaves(program.example_inputs)
    samples = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
    counted: dict[Any, int] = {}  # repeated blocks have regions alike
    for region in regions:
        alike = tuple((str(node.target), str(node.meta.get("val"))) for node in region.nodes)
        if alike not in counted:
            counted[alike] = _bytes(program, region, curvature)
    return int(MARGIN * max(counted.values(), default=0) / samples)


def _bytes(program: Program, region: Region, curvature: Curvature | None) -> int:
    """What a region keeps for the example inputs: its values, or those of its linearisation."""
    values = {node: node.meta.get("val") for node in region.nodes}
    if curvature is None:
        return 2 * sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
    with FakeTensorMode(allow_non_fake_inputs=True):
        sources = {source for node in region.nodes for source in node.all_input_nodes}
        stored = {
            str(node.target): torch.empty_like(program.tensor(str(node.target)))
            for node in sources if node.op == "get_attr"
        }  # fmt: skip
        frontier = {
            node: _empty(node) for node in sources - set(values) if node.op != "get_attr"
        }  # fmt: skip
        wanted = [_empty(node) for node in region.outputs]
        return _kept(program, region, curvature, (frontier, wanted), stored)


def _kept(
    program: Program, region: Region, curvature: Curvature, batch: tuple[Values, list[Tensor]],
    stored: dict[str, Tensor],
) -> int:  # fmt: skip
    names = variables(program, region)
    task = Lookahead(program, region, names, (None,) * len(names), lambda _: batch, stored)
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        product = task.product(0, tuple(stored[name] for name in names), curvature)
    held = pytree.tree_leaves([list(batch[0].values()), batch[1]])
    for tensor in held:
        if isinstance(tensor, Tensor):
            keep(tensor)
    weights = {tensor.untyped_storage()._cdata for tensor in stored.values()}
    found = sum(
        tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in weights
    )
    del product  # what has been counted lived until here
    return found


def _empty(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return torch.empty_like(value) if isinstance(value, Tensor) else value
