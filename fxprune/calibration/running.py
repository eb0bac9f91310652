"""Running a program on samples: the batch sizes that it takes, and the device that it is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program


def fixed_batch(program: Program) -> int | None:
    """Return the batch size that the program is fixed to; None if it takes any."""
    leaves = pytree.tree_leaves(program.example_inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or (program.dynamic and 0 in program.dynamic[0]):
        return None
    return int(tensors[0].shape[0])


@contextmanager
def placed(program: Program, device: str) -> Iterator[None]:
    """Have a program on a device for a while, then bring it back."""
    first = next(iter(program.graph_module.parameters()), None)
    home = first.device if first is not None else torch.device(device)
    program.to(device)
    try:
        yield
    finally:
        program.to(home)
