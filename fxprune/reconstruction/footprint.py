"""Memory that the activations of a region need, computed on tensors without data."""

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

MEMORY_MARGIN = 2.5  # times the kept tensors, for products with them and the allocator


def per_sample(
    program: Program, regions: Iterable[Region], curvature: Curvature | None = None
) -> int:
    """Return the bytes that a sample needs in the largest of the regions.

    Args:
        program: the program that the regions are part of.
        regions: parts of it.
        curvature: the curvature that is linearised there; None if values are only computed.

    """
    leaves = pytree.tree_leaves(program.example_inputs)
    samples = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
    counted: dict[Any, int] = {}  # repeated blocks have equal regions
    for region in regions:
        alike = tuple((str(node.target), str(node.meta.get("val"))) for node in region.nodes)
        if alike in counted:
            continue
        if curvature is None:
            values = (node.meta.get("val") for node in region.nodes)
            counted[alike] = 2 * sum(x.nbytes for x in values if isinstance(x, Tensor))
        else:
            with without_data(program, region) as (task, point):
                counted[alike] = _kept(task, point, curvature)
    return int(MEMORY_MARGIN * max(counted.values(), default=0) / samples)


def _kept(task: Lookahead, point: tuple[Tensor, ...], curvature: Curvature) -> int:
    """Bytes that the linearisation of a region keeps for the example inputs."""
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
    del product  # kept the counted tensors alive
    return found
