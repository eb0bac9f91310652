"""What a program costs, and what it will cost with units gone, in closed form.

Every cost is a sum of products of dimensions: a linear layer's multiply-accumulates are its
rows times its outputs times its inputs. Removing units shrinks dimensions by known amounts, so the
cost after removal is exact without touching the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxprune.graph.cost import Quantity, terms
from fxprune.graph.program import Program, shape_of
from fxprune.structure.groups import Analysis, Group, analyse
from fxprune.structure.labels import Labels
from fxprune.structure.merging import Ints


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs as a function of how many units each group loses.

    Attributes:
        groups: the groups, in the order of the counts.
        sizes: for each distinct dimension, its size now.
        shrink: dimensions x groups: by how much one unit of a group shrinks a dimension.
        factors: for each term, its constant.
        members: terms x dimensions per term: which dimensions it multiplies; the last dimension
            of ``sizes`` is one and fills up.
        rows: for each quantity, which terms belong to it.

    """

    groups: tuple[Group, ...]
    sizes: NDArray[np.float64]
    shrink: NDArray[np.float64]
    factors: NDArray[np.float64]
    members: Ints
    rows: dict[Quantity, NDArray[np.bool_]]

    def quantities(self, removed: NDArray[np.int64]) -> dict[Quantity, float]:
        """Return params, macs and weight_bytes once each group has lost so many units."""
        left = self.sizes - self.shrink @ removed
        products = self.factors * left[self.members].prod(axis=1)
        return {name: float(products[rows].sum()) for name, rows in self.rows.items()}


def cost_model(program: Program, groups: Sequence[Group]) -> CostModel:
    """Build the closed form of a program's costs over its groups.

    Frozen groups may be among ``groups``; their counts are to stay zero.
    """
    shrinkage = Shrinkage.of(program, groups)
    table: dict[tuple[Any, ...], int] = {}
    sizes: list[float] = []
    shrinks: list[NDArray[np.float64]] = []
    factors, members, quantities = [], [], []
    for term in terms(program):
        factor, dims = term.factor, []
        for node, dim in term.places:
            size = shape_of(node)[dim]
            shrink = shrinkage.at(node, dim)
            if shrink is None:
                factor *= size
                continue
            key = (size, shrink.tobytes())
            if key not in table:
                table[key] = len(sizes)
                sizes.append(float(size))
                shrinks.append(shrink)
            dims.append(table[key])
        factors.append(factor)
        members.append(dims)
        quantities.append(term.quantity)
    filler, width = len(sizes), max((len(dims) for dims in members), default=0)
    matrix = np.full((len(members), max(width, 1)), filler, dtype=np.int64)
    for row, dims in enumerate(members):
        matrix[row, : len(dims)] = dims
    kinds = np.array(quantities)
    names: tuple[Quantity, ...] = ("params", "macs", "weight_bytes")
    return CostModel(
        tuple(groups),
        np.array([*sizes, 1.0]),
        np.stack([*shrinks, np.zeros(len(groups))]),
        np.array(factors),
        matrix,
        {name: kinds == name for name in names},
    )


@dataclass(frozen=True, eq=False)
class Shrinkage:
    """By how much the units of groups shrink the dimensions of a program's values."""

    analysis: Analysis
    group_of: Ints  # by identity, the number of its group, or -1
    units: NDArray[np.float64]

    @classmethod
    def of(cls, program: Program, groups: Sequence[Group]) -> Shrinkage:
        """Analyse a program that the groups were found in."""
        analysis = analyse(program, groups[0].preference if groups else "heads")
        by_component = np.full(len(analysis.component), -1, dtype=np.int64)
        current = {group.name: group for group in analysis.groups}
        for number, group in enumerate(groups):
            by_component[current[group.name].components] = number
        units = np.array([len(group.units) for group in groups], dtype=np.float64)
        return cls(analysis, by_component[analysis.component], units)

    def at(self, node: fx.Node, dim: int) -> NDArray[np.float64] | None:
        """By how much one unit of each group shrinks a dimension; None where nothing does."""
        labels = self.analysis.flow.values.get(node)
        layer = next(labels.at(dim), None) if isinstance(labels, Labels) else None
        if layer is None:
            return None
        numbers = self.group_of[layer.ids.numpy()]
        numbers = numbers[(numbers >= 0) & (layer.ids.numpy() != 0)]
        if not numbers.size:
            return None
        places = np.bincount(numbers, minlength=len(self.units)).astype(np.float64)
        return places / self.units
