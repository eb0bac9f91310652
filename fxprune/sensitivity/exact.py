"""Traces without probes, where a sample has few outputs.

The diagonal of ``J' A J`` is the sum over outputs of the squares of ``J' L``, column by column, for
one sample at a time. Ten classes take ten backward passes per sample, made as one batched pass,
and leave no random error; probes on the outputs of a whole batch need hundreds for one per cent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.data.batches import Batch
from fxprune.errors import FxpruneError
from fxprune.sensitivity.model import single_tensor
from fxprune.sensitivity.probes import TraceProbes

ELEMENTS = 2**26  # of all gradients that are held at a time


def singles(batch: Batch) -> Iterator[Batch]:
    """Yield the samples of a batch as batches of one."""
    leaves, spec = pytree.tree_flatten((batch.inputs, batch.target))
    for number in range(len(batch)):
        rows = [leaf[number : number + 1] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        yield Batch(*pytree.tree_unflatten(rows, spec))


def exact_trace(probes: TraceProbes, sample: Batch) -> Tensor:
    """Return every unit's trace for one sample; ``probes`` says of which matrix."""
    made = probes.weights.outputs(probes.program, sample, probes.precision)
    target = probes.objective.target(made, sample.target, torch.Generator())
    outputs, leaves = single_tensor(made), probes.leaves()
    assert outputs is not None, "chosen only where there is one output"
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    eye = torch.eye(outputs.shape[1], device=outputs.device, dtype=wide)
    columns = [probes.objective.root(outputs, target, row[None]) for row in eye]
    width = max(ELEMENTS // max(sum(leaf.numel() for leaf in leaves), 1), 1)
    total = torch.zeros(len(probes.layout), dtype=torch.float64)
    for chunk in torch.stack(columns).split(width):
        try:
            gradients = torch.autograd.grad(
                outputs, leaves, (chunk * probes.scale).to(outputs.dtype),
                retain_graph=True, is_grads_batched=True, materialize_grads=True,
            )  # fmt: skip
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise FxpruneError(
                f"an operator of the model cannot be differentiated for several outputs at once: "
                f"{str(error).splitlines()[0]}; use estimator=outputs"
            ) from error
        squares = [gradient.to(wide).square().sum(0) for gradient in gradients]
        total += probes.collect(squares, probes.scale**2)
    return total
