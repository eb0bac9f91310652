"""Units and groups: what may be removed, found by running the graph on identities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.graph.facts import FROZEN, Preference, Slot
from fxprune.graph.notebook import html_table, plural
from fxprune.graph.program import Program
from fxprune.structure.choices import Choices, Survey
from fxprune.structure.flow import Flow
from fxprune.structure.merging import Ints, Reason
from fxprune.structure.rules.registry import known_rules


@dataclass(frozen=True)
class Unit:
    """Places that live or die together.

    Attributes:
        places: pairs of slot and index.

    """

    places: tuple[tuple[Slot, int], ...]


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        size = f"{plural(len(self.units), 'unit')}, {plural(len(self.slots), 'slot')}"
        why = f", frozen: {self.frozen_because}" if self.frozen_because else ""
        return f"Group({self.name}, {size}{why})"

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


class Groups(tuple[Group, ...]):
    """The groups of a program; a notebook shows them as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Groups({self._summary()})"

    def _repr_html_(self) -> str:
        rows = [
            (one.name, len(one.units), len(one.slots), one.frozen_because or "") for one in self
        ]
        return html_table(self._summary(), ("group", "units", "slots", "frozen because"), rows)

    def _summary(self) -> str:
        frozen = sum(group.frozen_because is not None for group in self)
        return f"{plural(len(self), 'group')}, {frozen} frozen"


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


def find_groups(program: Program, prefer: Preference = "heads") -> Groups:
    """Find what may be removed, and what may not and why.

    Shapes come from fake tensors; the model is not run.

    Args:
        program: the traced model.
        prefer: which factor of an attention width stays removable: whole heads, or the same
            positions in every head.

    """
    return Groups(analyse(program, prefer).groups)


def analyse(program: Program, prefer: Preference = "heads") -> Analysis:
    """Run the flow (twice where a dimension was split) and collect units and groups."""
    rules = known_rules()
    flow = _run(Flow(program, rules, Choices(), Survey()))
    if flow.survey is not None and flow.survey.factors:
        choices = flow.survey.decide(flow.merges, prefer)
        del flow  # what it knows takes as much memory as what the next one will
        flow = _run(Flow(program, rules, choices))
    component, reasons = flow.merges.components()
    return Analysis(flow, component, _collect(flow, component, reasons, prefer))


def _run(flow: Flow) -> Flow:
    """Label every value, and freeze what was found out to be not removable."""
    flow.run()
    frozen = flow.program.facts.get(FROZEN.name)
    for slot, why in frozen.why.items() if frozen else ():
        if (ids := flow.slots.get(Slot.parse(slot))) is not None:
            flow.merges.freeze(ids, Reason("", why))
    return flow


def _collect(flow: Flow, component: Ints, reasons: Ints, prefer: Preference) -> tuple[Group, ...]:
    group_of = _sorted_out(flow, component, reasons)
    places: dict[int, dict[Slot, tuple[Ints, Ints]]] = {}
    for slot, ids in flow.slots.items():
        own = component[ids.numpy()]
        groups = group_of[own]
        for number in np.unique(groups).tolist():
            indices = np.flatnonzero(groups == number).astype(np.int32)
            places.setdefault(number, {})[slot] = own[indices], indices
    mixed = _mixed_by(flow, component)
    units = np.full(len(reasons), -1, dtype=np.int32)  # the numbers of units within their group
    found, taken = [], set[str]()
    for number in list(places):  # in the order of their first slots
        own_places = places.pop(number)
        named = [slot for slot in own_places if not slot.tensor.startswith("node:")]
        if not named:
            continue
        # Of several reasons, the first in graph order.
        reason = min(int(reasons[members].min()) for members, _ in own_places.values())
        why = flow.merges.reasons[reason] if reason >= 0 else None
        if why is not None and why.silent:
            continue
        name = _unique(str(named[0]), taken)
        found.append(_group(name, own_places, units, why, prefer, mixed))
    return tuple(found)


def _sorted_out(flow: Flow, component: Ints, reasons: Ints) -> Ints:
    """Number groups: of components that occur equally often in each slot, frozen ones apart."""
    hashes = np.random.default_rng(0).integers(1, 2**63, len(flow.slots), dtype=np.uint64)
    signature = np.zeros(len(reasons), dtype=np.uint64)
    for ids, own in zip(flow.slots.values(), hashes, strict=True):
        np.add.at(signature, component[ids.numpy()], own)
    np.invert(signature, out=signature, where=reasons >= 0)
    numbers: Ints = np.unique(signature, return_inverse=True)[1].astype(np.int32)
    return numbers


def _mixed_by(flow: Flow, component: Ints) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, ids in flow.mixes:
        for number in np.unique(component[ids[ids != 0].numpy()]).tolist():
            names = found.setdefault(number, [])
            if name not in names:
                names.append(name)
    return found


def _unique(base: str, taken: set[str]) -> str:
    name, count = base, 2
    while name in taken:
        name, count = f"{base}#{count}", count + 1
    taken.add(name)
    return name


def _group(
    name: str, places: dict[Slot, tuple[Ints, Ints]], units: Ints, why: Reason | None,
    prefer: Preference, mixed: dict[int, list[str]],
) -> Group:  # fmt: skip
    # Units are numbered by their index along the first slot.
    head = next(iter(places.values()))[0]
    components = head[np.sort(np.unique(head, return_index=True)[1])]
    units[components] = np.arange(len(components))
    by_slot = {}
    for slot, (members, indices) in places.items():
        numbers = units[members]
        order = np.argsort(numbers, kind="stable")
        by_slot[slot] = numbers[order], indices[order]
    names = tuple(dict.fromkeys(name for c in components.tolist() for name in mixed.get(c, ())))
    text = why.text if why else None
    return Group(name, tuple(by_slot), text, names, prefer, components, by_slot)
