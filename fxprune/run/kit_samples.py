"""The samples that a latency kit carries, to judge accuracy on another machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.calibration.running import fixed_batch
from fxprune.data.batches import batches
from fxprune.data.roles import Data, subset
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.latency.kit import KitSamples
from fxprune.training.evaluate import classes, evaluate, run_program

BATCH = 32


def kit_samples(program: Program, data: Data | None, count: int, seed: int = 0) -> KitSamples:
    """Choose evaluation samples for a kit; without labels, the dense predictions stand for them.

    Args:
        program: the dense program.
        data: with evaluation samples.
        count: the largest number of samples.
        seed: of the choice.

    Raises:
        InputError: there are no evaluation samples, or the targets are not classes.

    """
    if data is None or data.eval is None:
        raise InputError("the data has no evaluation samples for the kit; leave out --samples")
    chosen = subset(data.eval, count, seed)
    size = fixed_batch(program)
    found = evaluate(
        run_program(program), chosen, batch_size=BATCH, reference=run_program(program),
        fixed_batch=size,
    )  # fmt: skip
    if found.accuracy is None:
        raise InputError(
            f"the kit cannot judge accuracy: {found.note}; leave out --data for latency alone"
        )
    (whole,) = batches(chosen, len(chosen))
    inputs = tuple(x for x in pytree.tree_leaves(whole.inputs) if isinstance(x, Tensor))
    if whole.target is not None:
        return KitSamples(inputs, whole.target, "labels of the data", found.accuracy)
    with torch.no_grad():
        predicted = [
            classes(run_program(program)(batch.inputs)) for batch in batches(chosen, size or BATCH)
        ]
    return KitSamples(
        inputs, torch.cat(predicted), "predictions of the dense model", found.accuracy
    )
