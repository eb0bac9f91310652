"""Inspect a model: its groups of units, their shares of the cost, and what is frozen and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxprune.graph.cost import Cost, cost
from fxprune.graph.facts import Preference
from fxprune.graph.notebook import plural
from fxprune.graph.program import Program
from fxprune.planning.cost_model import cost_model
from fxprune.structure.groups import Group, find_groups


@dataclass(frozen=True)
class GroupLine:
    """One group.

    Attributes:
        name: unique in the program.
        units: how many there are.
        slots: the dimensions that shrink with them.
        params_share: share of the parameters that goes with the whole group, from 0 to 1.
        macs_share: likewise of the multiply-accumulates.
        frozen_because: why nothing of it may be removed; None if it may.
        mixed_by: nodes whose statistics mix its units, so that removal is not exact.

    """

    name: str
    units: int
    slots: tuple[str, ...]
    params_share: float
    macs_share: float
    frozen_because: str | None
    mixed_by: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A program's costs and groups."""

    cost: Cost
    groups: tuple[GroupLine, ...]

    def to_json(self) -> str:
        """Return all of it as JSON."""
        content = {**asdict(self.cost), "groups": [asdict(group) for group in self.groups]}
        return json.dumps(content, indent=2)


def inspect(program: Program, attention: Preference = "heads") -> Inspection:
    """Find the groups and what each of them costs."""
    groups = find_groups(program, attention)
    return Inspection(cost(program), tuple(_lines(program, groups)))


def _lines(program: Program, groups: Sequence[Group]) -> list[GroupLine]:
    model = cost_model(program, groups)
    whole = model.quantities(np.zeros(len(groups), dtype=np.int64))
    lines = []
    for number, group in enumerate(groups):
        removed = np.zeros(len(groups), dtype=np.int64)
        removed[number] = len(group.units)
        left = model.quantities(removed)
        shares = [
            1 - left[name] / whole[name] if whole[name] else 0.0 for name in ("params", "macs")
        ]
        slots = tuple(map(str, group.slots))
        lines.append(
            GroupLine(
                group.name, len(group.units), slots, shares[0], shares[1],
                group.frozen_because, group.mixed_by,
            )
        )  # fmt: skip
    return lines


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the groups as tables: those that can shrink, then those that cannot."""
    total = found.cost
    console.print(
        f"{total.params:,} parameters, {total.macs:,} MACs per sample, "
        f"{total.weight_bytes:,} bytes of weights",
        highlight=False,
    )
    free = [group for group in found.groups if group.frozen_because is None]
    frozen = [group for group in found.groups if group.frozen_because is not None]
    console.print(f"\n{plural(len(free), 'group')} can shrink", style="bold")
    table = Table("group", "units", "params", "MACs", "slots", box=None, pad_edge=False)
    for number in (1, 2, 3):
        table.columns[number].justify = "right"
    for group in free:
        table.add_row(Text(group.name), *_figures(group), Text(_slots(group.slots, group.mixed_by)))
    console.print(table)
    if not frozen:
        return
    console.print(f"\n{plural(len(frozen), 'frozen group')}", style="bold")
    table = Table("group", "units", "params", "MACs", "reason", box=None, pad_edge=False)
    for number in (1, 2, 3):
        table.columns[number].justify = "right"
    for group in frozen:
        table.add_row(Text(group.name), *_figures(group), Text(group.frozen_because or ""))
    console.print(table)


def _figures(group: GroupLine) -> tuple[str, str, str]:
    return f"{group.units:,}", f"{group.params_share:.1%}", f"{group.macs_share:.1%}"


def _slots(slots: Sequence[str], mixed_by: Sequence[str]) -> str:
    rest = f", and {len(slots) - 4} more" if len(slots) > 4 else ""
    mixed = f"; mixed by {', '.join(mixed_by[:2])}" if mixed_by else ""
    return ", ".join(slots[:4]) + rest + mixed
