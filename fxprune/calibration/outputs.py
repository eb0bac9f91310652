"""Outputs of a model: which of them are class scores, and along which axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import InputError


def class_axis(logits: Tensor, target: Tensor | None = None) -> int:
    """Return the axis of the classes: 1, but the last one for token logits ``(N, T, classes)``."""
    if target is not None and logits.dim() == target.dim() + 1:
        without = [*logits.shape[:1], *logits.shape[2:]]
        return 1 if without == list(target.shape) else -1
    return -1 if logits.dim() == 3 else 1


def logits_of(outputs: Any) -> Tensor:
    """Pick the logits: the output itself, its entry ``logits``, or its first tensor."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        logits: Tensor = outputs["logits"]
        return logits
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError("the model's output has no tensor to evaluate")
    return tensors[0]
