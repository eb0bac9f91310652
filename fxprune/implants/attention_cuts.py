"""Cuts of attention: products whose positions go together, and the units that these are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fxprune.implants.attention_ranks import Basis
from fxprune.implants.attention_sites import Attention, Projection, positions
from fxprune.pipeline.contract import Skip
from fxprune.structure.groups import Group

Product = Literal["query-key", "value"]


@dataclass(frozen=True, eq=False)
class Draft:
    """A product that could be cut: its layers, and the basis that it is cut in."""

    product: Product
    attention: Attention
    parts: tuple[Projection, Projection]
    basis: Basis
    rank: int


@dataclass(frozen=True, eq=False)
class Cut:
    """Products whose positions go together, and the units that these are."""

    drafts: tuple[Draft, ...]
    rank: int
    group: Group
    units: list[int]


def cuts_of(drafts: Sequence[Draft], groups: Sequence[Group]) -> Iterator[Cut | Skip]:
    """Cut products of one call of attention each alone, or together where they shrink alike."""
    alone = [positions(groups, draft.parts) for draft in drafts]
    if len(drafts) == 2 and all(isinstance(place, str) for place in alone):
        both = positions(groups, [part for draft in drafts for part in draft.parts])
        if not isinstance(both, str):
            yield from _of_width(tuple(drafts), *both)
            return
    for draft, place in zip(drafts, alone, strict=True):
        if isinstance(place, str):
            yield Skip(f"{draft.attention.node.name}, {draft.product}", place)
        else:
            yield from _of_width((draft,), *place)


def _of_width(drafts: tuple[Draft, ...], group: Group, numbers: list[int]) -> Iterator[Cut | Skip]:
    rank = max(draft.rank for draft in drafts)
    if rank < len(numbers):
        yield Cut(drafts, rank, group, numbers[rank:])
        return
    for draft in drafts:
        reason = "no smaller rank keeps the unexplained part below the limit"
        yield Skip(f"{draft.attention.node.name}, {draft.product}", reason)
