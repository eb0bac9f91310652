"""How far a changed program's outputs are from the dense program's, after cheap repair.

The repair is a recalibration of batch norms at no extra cost: both programs are run with the
statistics of each batch. What is compared is therefore closer to what remains after the passes that
restore accuracy than a comparison of the programs as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.data.batches import Batch
from fxprune.graph.program import Program
from fxprune.training.norms import norms_of

TRAINING, MOMENTUM = 5, 6  # arguments of aten.batch_norm


class Damage:
    """The mean squared distance of outputs, relative to the variance of the dense outputs.

    Args:
        dense: the program that others are compared with.
        batches: what both are run on.

    """

    def __init__(self, dense: Program, batches: Sequence[Batch]) -> None:
        self._batches = list(batches)
        self._wanted = [_outputs(with_batch_statistics(dense), batch) for batch in self._batches]
        everything = [torch.cat(leaves) for leaves in zip(*self._wanted, strict=True)]
        self._variances = [max(float(leaf.var(0).mean()), 1e-30) for leaf in everything]

    def of(self, program: Program) -> float:
        """Judge a program with the same outputs; infinite where they are not finite."""
        judged = with_batch_statistics(program)
        shares = []
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            pairs = zip(_outputs(judged, batch), wanted, self._variances, strict=True)
            shares += [float((made - goal).square().mean()) / var for made, goal, var in pairs]
        total = sum(shares) / len(shares)
        return total if total == total else float("inf")  # NaN is not equal to itself


def with_batch_statistics(program: Program) -> Program:
    """Return a copy that shares tensors, whose batch norms use the statistics of each batch.

    Their stored statistics are not changed by running it.
    """
    copy = program.copy(share=True).eval()
    for node in norms_of(copy):
        node.update_arg(TRAINING, True)
        node.update_arg(MOMENTUM, 0.0)
    copy.graph_module.recompile()
    return copy


def _outputs(program: Program, batch: Batch) -> list[Tensor]:
    """Return the floating-point outputs as matrices, (samples, values), in double precision."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(program(*batch.inputs))
    kept: list[Any] = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return [leaf.double().reshape(len(leaf) if leaf.dim() else 1, -1) for leaf in kept]
