"""Which factor of a split dimension stays removable: heads or head width, group or offset.

A first run of the flow, the survey, follows every factor as if it were the one; what happens to
each (frozen, batch dimension of an attention product, ...) decides for the second run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxprune.graph.facts import Preference
from fxprune.structure.labels import DimLabels, SplitLabels
from fxprune.structure.merging import Ints, Merges

Key = tuple[str, int]


@dataclass(frozen=True)
class Choices:
    """The factor to keep removable, by node name and number of the entry that was split."""

    factors: Mapping[Key, int] = field(default_factory=dict)

    def factor(self, node: fx.Node, key: int, split: SplitLabels) -> int:
        """Return the chosen dimension; where the survey saw no such split, the longest."""
        chosen = self.factors.get((node.name, key))
        if chosen in split.dims:
            return int(chosen)
        return max(split.dims, key=lambda dim: split.ids.shape[split.dims.index(dim)])


@dataclass(eq=False)
class Survey:
    """Follows all factors of all splits at once, each with identities of its own."""

    virtual_from: int = 2**30
    count: int = 2**30
    factors: dict[Key, list[tuple[int, Tensor]]] = field(default_factory=dict)
    roles: dict[str, list[Tensor]] = field(default_factory=lambda: {"heads": [], "head_dim": []})

    def same_kind(self, left: Tensor, right: Tensor) -> bool:
        """Whether both are factor identities, or neither."""
        if not self.factors:
            return True
        return bool((left >= self.virtual_from).any() == (right >= self.virtual_from).any())

    def split(self, node: fx.Node, key: int, split: SplitLabels) -> tuple[DimLabels, ...]:
        """Give every factor identities of its own."""
        entries = []
        for position, dim in enumerate(split.dims):
            size = split.ids.shape[position]
            ids = torch.arange(self.count, self.count + size, dtype=torch.int32)
            self.count += size
            entries.append(DimLabels(dim, ids))
        self.factors[node.name, key] = [(entry.dim, entry.ids) for entry in entries]
        return tuple(entries)

    def note(self, role: str, ids: Tensor) -> None:
        """Record what an entry is in an attention product."""
        self.roles[role].append(ids)

    def decide(self, merges: Merges, prefer: Preference) -> Choices:
        """Choose a factor for every split: can shrink, preferred role, finest, in that order."""
        offset = self.virtual_from
        size = self.count - offset
        local = Merges(size + 1)
        for left, right in merges.pairs:
            if bool((left >= offset).any()):
                shifted = (left - offset + 1).clamp(min=0), (right - offset + 1).clamp(min=0)
                local.pairs.append(shifted)
        component, _ = local.components()
        frozen = np.zeros(component.max() + 1, dtype=bool)
        for ids, _ in merges.frozen:
            virtual = ids[ids >= offset] - offset + 1
            frozen[component[virtual.numpy()]] = True
        wanted = np.zeros_like(frozen)
        for ids in self.roles[prefer]:
            virtual = ids[ids >= offset] - offset + 1
            wanted[component[virtual.numpy()]] = True
        return Choices(self._assign(component, frozen, wanted))

    def _assign(
        self, component: Ints, frozen: NDArray[np.bool_], wanted: NDArray[np.bool_]
    ) -> dict[Key, int]:
        candidates = []
        for key, factors in self.factors.items():
            for dim, ids in factors:
                members = np.unique(component[(ids - self.virtual_from + 1).numpy()])
                rank = (bool(frozen[members].any()), not wanted[members].any(), -len(members), dim)
                candidates.append((rank, key, dim, members))
        candidates.sort(key=lambda candidate: candidate[0])
        chosen: dict[Key, int] = {}
        for _, key, dim, _ in candidates:
            chosen.setdefault(key, dim)
        return chosen
