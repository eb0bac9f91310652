"""Widths: how many units a group may lose so that what remains is a width that runs fast.

Latency is a staircase in the number of channels, so a layer with a few channels more than a
multiple of sixteen is slower than one with a few less, and odd widths are the slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.errors import InputError
from fxprune.graph.node_args import argument
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.structure.groups import Group
from fxprune.structure.merging import Ints

DEPTHWISE_FLOOR = 4  # below, a depthwise convolution is five to six times slower


@dataclass(frozen=True)
class Rounding:
    """What widths are multiples of, as long as enough remains.

    A width is a multiple of the whole where at least twice as much remains, of half where at
    least as much remains, of a quarter below.

    Attributes:
        dense: for ordinary layers.
        depthwise: for groups with a depthwise convolution; a multiple of four, as all its widths.
        floor: what every width is a multiple of at least.

    """

    dense: int = 16
    depthwise: int = 8
    floor: int = 1

    def __post_init__(self) -> None:
        if self.dense < 1:
            raise InputError(f"round-to is {self.dense}; it must be at least 1")
        if self.depthwise < 1 or self.depthwise % DEPTHWISE_FLOOR:
            raise InputError(
                f"depthwise-round-to is {self.depthwise}; it must be a multiple of "
                f"{DEPTHWISE_FLOOR}, because other widths are several times slower"
            )

    def finer(self) -> Rounding | None:
        """Return the next rounding to try where this one does not land, if there is one."""
        if self.dense <= self.floor:
            return None
        quarters = self.depthwise // DEPTHWISE_FLOOR
        return Rounding(self.dense // 2, DEPTHWISE_FLOOR * max(1, quarters // 2), self.floor)

    def ladder(self) -> list[Rounding]:
        """Return this rounding and all finer ones."""
        found = [self]
        while (finer := found[-1].finer()) is not None:
            found.append(finer)
        return found


@dataclass(frozen=True)
class Widths:
    """The widths that the units of a group make up.

    Attributes:
        units: how many there are.
        channels: how many channels each stands for, one number per kind of weight dimension.
        depthwise: whether a depthwise convolution is among the layers.

    """

    units: int
    channels: tuple[int, ...] = (1,)
    depthwise: bool = False

    def losses(self, rounding: Rounding, keep: int = 1) -> Ints:
        """Return how many units may go, ascending from zero, which is always allowed.

        Args:
            rounding: what the channels that remain are a multiple of.
            keep: how many units remain at least.

        """
        kept = np.arange(self.units - 1, max(keep, 1) - 1, -1)
        fits = np.ones(len(kept), dtype=bool)
        base = rounding.depthwise if self.depthwise else rounding.dense
        floor = DEPTHWISE_FLOOR if self.depthwise else rounding.floor
        for channels in self.channels:
            width = kept * channels
            step = np.where(width >= 2 * base, base, np.where(width >= base, base // 2, base // 4))
            fits &= width % np.maximum(step // floor * floor, floor) == 0
        return np.concatenate([[0], self.units - kept[fits]]).astype(np.int64)

    def choices(
        self, rounding: Rounding, min_units: int, max_ratio: float, ratio: float | None
    ) -> Ints:
        """Return how many units may go within limits, or the one number nearest to a share."""
        if ratio is not None:
            allowed = self.losses(rounding)
            return allowed[[int(np.abs(allowed - ratio * self.units).argmin())]]
        return self.losses(
            rounding, max(min_units, self.units - int(max_ratio * self.units + 1e-9))
        )


def widths(program: Program, groups: Sequence[Group]) -> tuple[Widths, ...]:
    """Find what each group's units mean in channels of convolutions and matrix products."""
    dense: dict[tuple[int, int], bool] = {}
    for name, dim, depthwise in _weight_dims(program):
        key = (id(program.tensor(name)), dim)
        dense[key] = dense.get(key, False) or depthwise
    return tuple(_of_group(program, group, dense) for group in groups)


def _of_group(program: Program, group: Group, dense: dict[tuple[int, int], bool]) -> Widths:
    slots = [slot for slot in group.slots if not slot.tensor.startswith("node:")]
    keys = {slot: (id(program.tensor(slot.tensor)), slot.dim) for slot in slots}
    weights = [slot for slot in slots if keys[slot] in dense]
    counted = weights or [min(group.slots, key=group.multiplicity)]
    channels = tuple(sorted({group.multiplicity(slot) for slot in counted}))
    return Widths(len(group.units), channels, any(dense[keys[slot]] for slot in weights))


def _weight_dims(program: Program) -> Iterator[tuple[str, int, bool]]:
    """Yield each dimension of a weight that is a number of channels, and whether depthwise."""
    for node in program.graph.nodes:
        operator = operator_of(node)
        if operator.macs is None:
            continue
        names = [
            str(source.target)
            for source in node.all_input_nodes
            if source.op == "get_attr" and source.meta["val"].dim() >= 2
        ]
        convolution = operator.is_convolution
        blocks = argument(node, "groups") if convolution else 1
        for name in names:
            shape = program.tensor(name).shape
            dims = (0, 1) if convolution else (len(shape) - 2, len(shape) - 1)
            depthwise = convolution and blocks > 1 and shape[1] == 1
            for dim in dims if blocks == 1 else (0,):
                yield name, dim, depthwise
