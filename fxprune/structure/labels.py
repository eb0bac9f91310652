"""Labels: which removable unit each index of a tensor's dimensions belongs to.

A ``DimLabels`` says, for one dimension, the identity of every index along it (0: none, never
removable). A tensor carries one entry per dimension that something may be removed from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DimLabels:
    """Identities along one dimension: ``ids`` is int32, one entry per index."""

    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Labels:
    """The shape of a value and the entries on it."""

    shape: tuple[int, ...]
    entries: tuple[DimLabels, ...] = ()

    def at(self, dim: int) -> Iterator[DimLabels]:
        """Yield the entries on a dimension; negative ones count from the last."""
        dim = dim % len(self.shape) if self.shape else dim
        return (entry for entry in self.entries if entry.dim == dim)

    def without(self, *dims: int) -> tuple[DimLabels, ...]:
        """Return the entries on other dimensions than these."""
        gone = {dim % len(self.shape) for dim in dims}
        return tuple(entry for entry in self.entries if entry.dim not in gone)


def unlabelled(value: Any) -> Any:
    """Return labels without entries for a fake tensor, or for each of several; None for others."""
    if isinstance(value, Tensor):
        return Labels(tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return [unlabelled(item) for item in value]
    return None


def spread(entry: DimLabels, shape: tuple[int, ...]) -> Tensor:
    """Return identities in the full shape, without memory for the other dimensions.

    >>> import torch
    >>> spread(DimLabels(1, torch.tensor([5, 6])), (2, 2)).tolist()
    [[5, 6], [5, 6]]
    """
    view = [1] * len(shape)
    view[entry.dim] = shape[entry.dim]
    return entry.ids.view(view).expand(shape)


@dataclass(frozen=True)
class SplitLabels:
    """Identities that vary along several dimensions, after one was split into factors.

    Attributes:
        dims: the dimensions they vary along, in order.
        ids: the identities over those dimensions.

    """

    dims: tuple[int, ...]
    ids: Tensor


def gather(ids: Tensor) -> DimLabels | SplitLabels | Tensor:
    """Say along which dimension a full tensor of identities varies; zeros fit everywhere.

    Returns:
        A entry if it varies along one dimension, a split if along several that cannot be told
        apart, or a scalar tensor if it does not vary.

    """
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and stride == 0:  # all at first: comparing would fill in what is expanded
            ids = ids.narrow(dim, 0, 1)
    varying: tuple[int, ...] = ()
    for dim, size in enumerate(ids.shape):
        if size > 1 and bool((ids != ids.narrow(dim, 0, 1)).any()):
            varying += (dim,)
        elif size > 1:
            ids = ids.narrow(dim, 0, 1)
    ids = ids[tuple(slice(None) if dim in varying else 0 for dim in range(ids.dim()))]
    if not varying:
        return ids
    if len(varying) == 1:
        return DimLabels(varying[0], ids.clone())
    for position, dim in enumerate(varying):
        others = tuple(other for other in range(len(varying)) if other != position)
        vector = ids.amax(others)
        view = [1] * len(varying)
        view[position] = -1
        if bool(((ids == vector.view(view)) | (ids == 0)).all()):
            return DimLabels(dim, vector)
    return SplitLabels(varying, ids)


def rows(split: SplitLabels, dim: int) -> Tensor:
    """Return a split's identities as (size of ``dim``, everything else)."""
    moved = split.ids.movedim(split.dims.index(dim), 0)
    return moved.reshape(moved.shape[0], -1)
