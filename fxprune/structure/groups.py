"""Units and groups: what may be removed, found by running the graph on identities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.facts import Slot
from fxprune.graph.program import Program
from fxprune.rules import known_rules
from fxprune.structure.choices import Choices, Preference, Survey
from fxprune.structure.flow import Flow
from fxprune.structure.merging import Ints, Reason


@dataclass(frozen=True)
class Unit:
    """Places that live or die together.

    Attributes:
        places: pairs of slot and index.

    """

    places: tuple[tuple[Slot, int], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that occupy the same slots, equally often, and so can be ranked against each other.

    Attributes:
        name: unique in the program; the first slot that the units occupy.
        slots: the dimensions of parameters, buffers and literals that shrink with the group.
        frozen_because: why nothing of the group may be removed; None if it may.
        mixed_by: nodes whose statistics mix these units, so that removal is not exact.
        preference: which factor of attention widths the analysis kept removable.
        components: the identity of each unit within ``Analysis``.

    """

    name: str
    slots: tuple[Slot, ...]
    frozen_because: str | None
    mixed_by: tuple[str, ...]
    preference: Preference
    components: Ints = field(repr=False)
    _places: dict[Slot, tuple[Ints, Ints]] = field(repr=False)

    @property
    def units(self) -> Sequence[Unit]:
        """The units, made on demand."""
        return _Units(self)

    def places(self, slot: Slot) -> tuple[Ints, Ints]:
        """Return unit numbers and indices along a slot, pairwise, by rising unit number."""
        units, indices = self._places[slot]
        return units.astype(np.int64), indices.astype(np.int64)

    def multiplicity(self, slot: Slot) -> int:
        """How many indices of a slot each unit occupies."""
        return len(self._places[slot][0]) // len(self.components)


class _Units(Sequence[Unit]):
    def __init__(self, group: Group) -> None:
        self._group = group

    def __len__(self) -> int:
        return len(self._group.components)

    def __getitem__(self, number: int) -> Unit:  # type: ignore[override]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        places = []
        for slot in self._group.slots:
            units, indices = self._group.places(slot)
            places += [(slot, int(index)) for index in indices[units == number]]
        return Unit(tuple(places))

    def __iter__(self) -> Iterator[Unit]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that the flow found: labels of every value, components, groups.

    Attributes:
        flow: the labels of every node.
        component: by identity.
        groups: removable ones and frozen ones, in graph order.

    """

    flow: Flow
    component: Ints
    groups: tuple[Group, ...]


def find_groups(program: Program, prefer: Preference = "heads") -> tuple[Group, ...]:
    """Find what may be removed, and what may not and why.

    Shapes come from fake tensors; the model is not run.

    Args:
        program: the traced model.
        prefer: which factor of an attention width stays removable: whole heads, or the same
            positions in every head.

    """
    return analyse(program, prefer).groups


def analyse(program: Program, prefer: Preference = "heads") -> Analysis:
    """Run the flow (twice where a dimension was split) and collect units and groups."""
    rules = known_rules()
    flow = Flow(program, rules, Choices(), Survey()).run()
    if flow.survey is not None and flow.survey.factors:
        choices = flow.survey.decide(flow.merges, prefer)
        del flow  # what it knows takes as much memory as what the next one will
        flow = Flow(program, rules, choices).run()
    component, reasons = flow.merges.components()
    return Analysis(flow, component, _collect(flow, component, reasons, prefer))


def _collect(flow: Flow, component: Ints, reasons: Ints, prefer: Preference) -> tuple[Group, ...]:
    slots = list(flow.slots)
    identities = np.concatenate([flow.slots[slot].numpy() for slot in slots] or [np.zeros(0, int)])
    sizes = [flow.slots[slot].numel() for slot in slots]
    place_slot = np.repeat(np.arange(len(slots), dtype=np.int32), sizes)
    place_index = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes] or [identities])
    place_component = component[identities]
    signature = _signatures(place_component, place_slot, len(reasons))
    mixed = _mixed_by(flow, component)

    present = np.unique(place_component)
    key = signature[present]
    np.invert(key, out=key, where=reasons[present] >= 0)
    group_of = np.full(len(reasons), -1, dtype=np.int32)
    group_of[present] = np.unique(key, return_inverse=True)[1]

    place_group = group_of[place_component]
    order = np.argsort(place_group, kind="stable")  # group by group, slot by slot
    starts = np.flatnonzero(np.diff(place_group[order])) + 1
    parts = np.split(order, starts) if len(order) else []
    parts.sort(key=lambda places: place_slot[places[:1]].tolist())  # by the first slot of each
    numbers = np.full(len(reasons), -1, dtype=np.int32)  # of units within their group
    is_literal = np.array([slot.tensor.startswith("node:") for slot in slots], dtype=bool)
    groups, taken = [], set[str]()
    for places in parts:
        if is_literal[place_slot[places]].all():
            continue
        reason = reasons[place_component[places]].min()  # of several, the first in graph order
        why = flow.merges.reasons[reason] if reason >= 0 else None
        if why is not None and why.silent:
            continue
        groups.append(_group(slots, places, (place_slot, place_index, place_component), numbers,
                             why, prefer, mixed, taken))  # fmt: skip
    return tuple(groups)


def _signatures(component: Ints, slot: Ints, total: int) -> np.ndarray:
    """Hash, per component, how often it occurs in each slot."""
    random = np.random.default_rng(0).integers(1, 2**63, slot.max(initial=0) + 1, dtype=np.uint64)
    signature = np.zeros(total, dtype=np.uint64)
    np.add.at(signature, component, random[slot])
    return signature


def _mixed_by(flow: Flow, component: Ints) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, ids in flow.mixes:
        for number in np.unique(component[ids[ids != 0].numpy()]).tolist():
            names = found.setdefault(number, [])
            if name not in names:
                names.append(name)
    return found


def _group(
    slots: list[Slot], places: Ints, table: tuple[Ints, Ints, Ints], numbers: Ints,
    why: Reason | None, prefer: Preference, mixed: dict[int, list[str]], taken: set[str],
) -> Group:  # fmt: skip
    place_slot, place_index, place_component = table
    own, starts = np.unique(place_slot[places], return_index=True)
    pieces = np.split(places, starts[1:])
    # Units are numbered by their index along the first slot.
    head = place_component[pieces[0]]
    components = head[np.sort(np.unique(head, return_index=True)[1])]
    numbers[components] = np.arange(len(components))
    by_slot = {}
    for slot, piece in zip(own.tolist(), pieces, strict=True):
        units = numbers[place_component[piece]]
        order = np.argsort(units, kind="stable")
        by_slot[slots[slot]] = (units[order], place_index[piece][order])
    names = tuple(dict.fromkeys(name for c in components.tolist() for name in mixed.get(c, ())))
    members = tuple(by_slot)
    base = str(next((slot for slot in members if not slot.tensor.startswith("node:")), members[0]))
    name, count = base, 2
    while name in taken:
        name, count = f"{base}#{count}", count + 1
    taken.add(name)
    return Group(name, members, why.text if why else None, names, prefer, components, by_slot)
