"""Which widths a group may be cut to, so that what is left runs fast.

ONNX Runtime's convolutions come in blocks of channels: 61 channels are slower than 64, and a
depthwise convolution whose channels are no multiple of four is five times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxprune.groups import Group
from fxprune.merging import Ints
from fxprune.program import Program, shape_of

FLOOR = 4  # channels that always stay, where a unit is one channel


@dataclass(frozen=True)
class Width:
    """A group's width: units, channels per unit, and the multiple that its channels should be.

    Attributes:
        units: how many there are.
        channels: how many channels of the widest slot a unit stands for.
        depthwise: whether a depthwise convolution runs over these channels.
        least: units that must stay.

    """

    units: int
    channels: int
    depthwise: bool
    least: int

    def removals(self, round_to: int, depthwise_round_to: int) -> Ints:
        """Return the numbers of units that may be removed, rising from 0."""
        kept = np.arange(self.least, self.units)
        channels = kept * self.channels
        base = depthwise_round_to if self.depthwise else round_to
        multiple = np.where(channels >= 2 * base, base, np.maximum(base // 2, 1))
        multiple = np.where(channels < base, np.maximum(base // 4, 1), multiple)
        if self.depthwise and base >= FLOOR:
            multiple = np.maximum(multiple, FLOOR)
        allowed = kept[channels % multiple == 0]
        return np.concatenate([[0], self.units - allowed[::-1]]).astype(np.int64)


def widths(
    program: Program, groups: Sequence[Group], min_units: int, max_ratios: Sequence[float]
) -> tuple[Width, ...]:
    """Measure every group: its channels per unit, and what must stay."""
    depthwise = {str(node.target) for node in _depthwise_weights(program)}
    found = []
    for group, ratio in zip(groups, max_ratios, strict=True):
        units = len(group.units)
        slots = [slot for slot in group.slots if not slot.tensor.startswith("node:")]
        channels = group.multiplicity(slots[0])
        least = max(min_units, int(np.ceil((1 - ratio) * units - 1e-9)), 1)
        if channels == 1:
            least = max(least, min(FLOOR, units))
        is_depthwise = any(slot.tensor in depthwise and slot.dim == 0 for slot in slots)
        found.append(Width(units, channels, is_depthwise, min(least, units)))
    return tuple(found)


def _depthwise_weights(program: Program) -> list[fx.Node]:
    found = []
    for node in program.graph.nodes:
        if not str(node.target).startswith("aten.conv"):
            continue
        weight = node.args[1]
        channels = shape_of(node.args[0])[1]
        if weight.op == "get_attr" and shape_of(weight)[1] == 1 and channels > 1:
            found.append(weight)
    return found
