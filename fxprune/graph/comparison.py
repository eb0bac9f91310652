"""How far two outputs are apart; a NaN or an infinity on one side only is an infinite error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def relative_error(expected: Any, found: Any) -> float:
    """Return the largest absolute difference over the largest absolute expected value.

    NaN and infinite elements count as equal only where both tensors have the same ones in the
    same places; otherwise, and where shapes differ, the error is infinite. Leaves that are not
    tensors, such as numbers and None, differ infinitely unless they are equal.
    """
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        same = type(expected) is type(found) and (expected is found or bool(expected == found))
        return 0.0 if same else math.inf
    if expected.shape != found.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    left, right = _real(expected), _real(found)
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()) or not torch.equal(
        left[~finite].nan_to_num(nan=0.0), right[~finite].nan_to_num(nan=0.0)
    ):
        return math.inf
    left, right = left[finite], right[finite]
    if not left.numel():
        return 0.0
    difference, scale = (left - right).abs().max().item(), left.abs().max().item()
    return float(difference / scale) if scale else float(difference)


def worst_error(expected: Any, found: Any) -> float:
    """Return the largest ``relative_error`` over the leaves of two trees of outputs.

    Trees with different numbers of leaves differ infinitely.
    """
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    if len(left) != len(right):
        return math.inf
    return max(map(relative_error, left, right), default=0.0)


def _real(tensor: Tensor) -> Tensor:
    """The values in double precision; a complex tensor gets a last dimension of two."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj().to(torch.complex128))
    return tensor.double()
