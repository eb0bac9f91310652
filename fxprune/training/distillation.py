"""What training minimises: the loss on labels and the distance to the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.errors import InputError
from fxprune.pipeline.context import Context
from fxprune.sensitivity.model import kind_of

LossOf = Callable[[Any, tuple[Any, ...], Any], Tensor]


def objective(context: Context, distill: float, temperature: float) -> LossOf:
    """Return ``loss(outputs, inputs, target)`` of a batch, to be minimised.

    Args:
        context: the loss on labels, the dense model, the device.
        distill: weight of the distance to the dense model; the loss on labels weighs the rest.
            Without labels distillation is all there is.
        temperature: softens both sides where the loss is cross-entropy.

    Raises:
        InputError: distillation is asked for and the context has no dense model.

    """
    kind = kind_of(context.loss)
    if distill and context.dense is None:
        raise InputError("distillation needs the dense model; set Context.dense, or distill=0")
    dense = context.dense.copy().eval().to(context.device) if context.dense else None

    def of_labels(outputs: Any, target: Any) -> Tensor:
        if kind == "other":
            return context.loss(outputs, target)
        logits = logits_of(outputs)
        if kind == "cross-entropy" and class_axis(logits, target) == -1 and logits.dim() > 2:
            logits = logits.movedim(-1, 1)  # token logits; cross_entropy wants classes second
        return context.loss(logits, target)

    def loss(outputs: Any, inputs: tuple[Any, ...], target: Any) -> Tensor:
        weight = distill if target is not None else 1.0
        if dense is None and weight:
            raise InputError(
                "training without labels needs the dense model as a teacher; set Context.dense"
            )
        parts = [] if weight == 1 else [(1 - weight) * of_labels(outputs, target)]
        if dense is not None and weight:
            with torch.no_grad():
                wanted = dense(*inputs)
            if kind == "cross-entropy":
                apart = divergence(logits_of(outputs), logits_of(wanted), temperature)
            else:
                apart = relative_distance(outputs, wanted)
            parts.append(weight * apart)
        return torch.stack(parts).sum()

    return loss


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened predictions, times the squared temperature.

    Averaged over samples (and pixels or tokens); see arXiv 1503.02531, section 2.1.
    """
    axis = class_axis(wanted)
    actual = torch.log_softmax(logits / temperature, axis)
    expected = torch.log_softmax(wanted / temperature, axis)
    return (expected.exp() * (expected - actual)).sum(axis).mean() * temperature**2


def relative_distance(outputs: Any, wanted: Any) -> Tensor:
    """Squared error relative to the wanted output's power, averaged over floating-point outputs."""
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
    errors = [
        (a - b).square().mean() / b.square().mean().clamp_min(1e-12)
        for a, b in pairs
        if isinstance(b, Tensor) and b.is_floating_point()
    ]
    return torch.stack(errors).mean()
