"""From weights to units: which elements die with which unit, as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.graph.program import Program
from fxprune.structure.groups import Group

NOWHERE = -1  # the label of an index that belongs to no unit


@dataclass(frozen=True)
class UnitLayout:
    """All units of several groups, numbered through, and the weights that die with each.

    Attributes:
        groups: the groups, in order of their units' numbers.
        labels: by parameter name and dimension, the unit of every index, or ``NOWHERE``.

    """

    groups: tuple[Group, ...]
    labels: Mapping[str, Mapping[int, Tensor]]

    @classmethod
    def of(cls, program: Program, groups: Sequence[Group]) -> UnitLayout:
        """Lay out the units of the removable groups among these."""
        removable = tuple(group for group in groups if group.frozen_because is None)
        labels: dict[str, dict[int, Tensor]] = {}
        names = _parameters(program)
        for group, start in zip(removable, _starts(removable), strict=True):
            for slot in group.slots:
                if slot.tensor not in names:
                    continue
                size = program.tensor(slot.tensor).shape[slot.dim]
                units, indices = group.places(slot)
                row = labels.setdefault(slot.tensor, {}).setdefault(
                    slot.dim, torch.full((size,), NOWHERE)
                )
                row[torch.from_numpy(indices)] = torch.from_numpy(units) + start
        return cls(removable, labels)

    def __len__(self) -> int:
        return sum(len(group.units) for group in self.groups)

    def starts(self) -> Iterator[tuple[Group, int]]:
        """Yield each group with the number of its first unit."""
        yield from zip(self.groups, _starts(self.groups), strict=True)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum elementwise values over all that dies with each unit.

        Args:
            values: by parameter name, a tensor of the parameter's shape.

        Returns:
            One float64 sum per unit; an element that a unit holds along two dimensions counts once.

        """
        rows, units = [], []
        for name, dims in self.labels.items():
            value = values[name]
            for dim, label in dims.items():
                rows.append(_along(value, dim))
                units.append(label)
            for (one, first), (two, second) in itertools.combinations(dims.items(), 2):
                shared = (first[:, None] == second) & (first[:, None] != NOWHERE)
                if bool(shared.any()):
                    rows.append(-_along(value, one, two)[shared.to(value.device)])
                    units.append(first[:, None].expand_as(shared)[shared])
        if not rows:
            return torch.zeros(len(self), dtype=torch.float64)
        flat = torch.cat([row.double().cpu() for row in rows])
        total = torch.zeros(len(self) + 1, dtype=torch.float64)
        return total.index_add_(0, torch.cat(units) % (len(self) + 1), flat)[:-1]

    def counts(self, program: Program) -> Tensor:
        """Return how many weights die with each unit, at least one."""
        ones = {name: torch.ones_like(program.tensor(name)) for name in self.labels}
        return self.sums(ones).clamp(min=1)

    def split(self, scores: Tensor) -> dict[str, Tensor]:
        """Cut a vector over all units into one per group, by the group's name."""
        sizes = [len(group.units) for group in self.groups]
        parts = scores.split(sizes) if sizes else ()
        return {group.name: part for group, part in zip(self.groups, parts, strict=True)}

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Undo ``split``; units of groups without a part get NaN."""
        missing = [
            parts.get(group.name, torch.full((len(group.units),), torch.nan, dtype=torch.float64))
            for group in self.groups
        ]
        return torch.cat(missing) if missing else torch.zeros(0, dtype=torch.float64)

    def spread(self, scores: Tensor) -> dict[str, dict[int, Tensor]]:
        """Return, by parameter and dimension, the score of every index; NaN where there is none."""
        padded = torch.cat([scores, scores.new_full((1,), torch.nan)])
        return {
            name: {dim: padded[label] for dim, label in dims.items()}
            for name, dims in self.labels.items()
        }


def _parameters(program: Program) -> set[str]:
    return {
        str(node.target)
        for node in program.tensor_nodes()
        if isinstance(tensor := program.tensor(str(node.target)), nn.Parameter)
        and tensor.is_floating_point()
    }


def _starts(groups: Sequence[Group]) -> list[int]:
    return list(itertools.accumulate((len(group.units) for group in groups), initial=0))[:-1]


def _along(value: Tensor, *dims: int) -> Tensor:
    others = [dim for dim in range(value.dim()) if dim not in dims]
    return value.sum(others) if others else value
