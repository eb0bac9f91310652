"""How much memory a region's activations take, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program
from fxprune.reconstruction.derivatives import without_data
from fxprune.reconstruction.lookahead import Curvature, Lookahead
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
    with without_data(program, region) as (task, point):
        return _kept(task, point, curvature)


def _kept(task: Lookahead, point: tuple[Tensor, ...], curvature: Curvature) -> int:
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        product = task.product(0, point, curvature)
    batch = task.batch(0)
    held = pytree.tree_leaves([list(batch[0].values()), batch[1]])
    for tensor in held:
        if isinstance(tensor, Tensor):
            keep(tensor)
    weights = {tensor.untyped_storage()._cdata for tensor in task.fixed.values()}
    found = sum(
        tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in weights
    )
    del product  # what has been counted lived until here
    return found
