"""Union of identities, in bulk: pairs are collected as arrays and resolved once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

EDGES = 2**14  # pairs that are resolved at once
MANY = 2**12  # beyond it, as where index tables are flattened, most are repeated
Ints = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Reason:
    """Why identities are frozen: the node that froze them and what a reader should know.

    Attributes:
        node: the graph node's name.
        text: the whole explanation, one paragraph.
        silent: nobody would expect the dimension to be removable (kernel sizes).

    """

    node: str
    text: str
    silent: bool = False


@dataclass(eq=False)
class Merges:
    """Identities handed out so far, the pairs found equal, and those frozen."""

    count: int = 1  # identity 0 means none
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, int]] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)

    def fresh(self, size: int) -> Tensor:
        """Hand out new identities."""
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.int32)

    def merge(self, left: Tensor, right: Tensor, reason: Callable[[], Reason]) -> None:
        """Let identities that meet live or die together; meeting none (0) freezes."""
        if left is right:
            return
        if left.numel() > MANY:
            both = (left.long().reshape(-1) << 32 | right.reshape(-1)).unique()
            left, right = (both >> 32).int(), (both & 0xFFFFFFFF).int()
        self.pairs.append((left, right))
        none = (left == 0) != (right == 0)
        if bool(none.any()):
            self.freeze(torch.maximum(left, right)[none], reason())

    def freeze(self, ids: Tensor, reason: Reason) -> None:
        """Never remove these."""
        if not self.reasons or self.reasons[-1] is not reason:
            self.reasons.append(reason)
        ids = ids.reshape(-1) if ids.numel() <= MANY else ids.unique()
        self.frozen.append((ids, len(self.reasons) - 1))

    def components(self) -> tuple[Ints, Ints]:
        """Resolve everything.

        Returns:
            The component of each identity, and for each component the number of the reason that
            froze it first, or -1.

        """
        component: Ints = np.arange(self.count, dtype=np.int32)
        for left, right in self._edges():
            component = _united(component, component[left], component[right])
        component, total = _renumbered(component)
        reason = np.full(total, len(self.reasons), dtype=np.int32)
        if self.frozen:
            ids = _join([entry[0] for entry in self.frozen])
            number = np.repeat(
                [entry[1] for entry in self.frozen], [entry[0].numel() for entry in self.frozen]
            )
            np.minimum.at(reason, component[ids], number)
        reason[reason == len(self.reasons)] = -1
        return component, reason

    def _edges(self) -> Iterator[tuple[Ints, Ints]]:
        """Yield the ends of all pairs, a limited number at once."""
        sizes = np.cumsum([left.numel() for left, _ in self.pairs])
        for _, part in groupby(zip(self.pairs, sizes // EDGES, strict=True), lambda item: item[1]):
            lefts, rights = zip(*(pair for pair, _ in part), strict=True)
            left, right = _join(lefts), _join(rights)
            met = (left != 0) & (right != 0) & (left != right)
            yield left[met], right[met]


def _united(component: Ints, left: Ints, right: Ints) -> Ints:
    """Let pairs of components be one, which keeps its lowest number."""
    nodes, ends = np.unique(np.stack([left, right]), return_inverse=True)
    edges = coo_array((np.ones(len(left), bool), tuple(ends.reshape(2, -1))), (len(nodes),) * 2)
    part = connected_components(edges, directed=False)[1]
    lowest = nodes[np.unique(part, return_index=True)[1]]
    now = np.arange(len(component), dtype=np.int32)
    now[nodes] = lowest[part]
    united: Ints = now[component]
    return united


def _renumbered(component: Ints) -> tuple[Ints, int]:
    """Number the components that there are from zero; return also how many there are."""
    present = np.zeros(len(component), dtype=bool)
    present[component] = True
    number = np.cumsum(present, dtype=np.int32)
    return number[component] - np.int32(1), int(number[-1])


def _join(parts: Sequence[Tensor]) -> Ints:
    if not parts:
        return np.zeros(0, dtype=np.int32)
    joined: Ints = torch.cat([part.reshape(-1) for part in parts]).numpy()
    return joined
