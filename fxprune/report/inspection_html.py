"""A program's groups as one HTML file: the graph drawn, each group in its colour, and a table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.graph.facts import Slot
from fxprune.graph.program import Program
from fxprune.report.drawing import WIDTH, Box, draw
from fxprune.report.inspection import GroupLine, Inspection

TURN = 137.508  # degrees between the hues of neighbouring groups: the golden angle, never a repeat


@dataclass(frozen=True)
class Marked:
    """A group with its number on the page and its colour."""

    number: int
    group: GroupLine
    colour: str


def inspection_html(program: Program, found: Inspection) -> str:
    """Draw a program, and list its groups."""
    drawing = Environment(
        loader=PackageLoader("fxprune", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    groups = sorted(found.groups, key=lambda group: group.frozen_because is not None)
    marked = [
        Marked(number, group, _colour(number, group)) for number, group in enumerate(groups, 1)
    ]
    holders: dict[str, list[Marked]] = defaultdict(list)
    for mark in marked:
        for tensor in dict.fromkeys(Slot.parse(slot).tensor for slot in mark.group.slots):
            holders[tensor].append(mark)
    graph = draw(program)
    return drawing.get_template("inspect.html.j2").render(
        cost=found.cost, groups=marked, graph=graph, box_width=WIDTH,
        boxes=[(box, _chips(box, holders)) for box in graph.boxes],
    )  # fmt: skip


def _chips(box: Box, holders: dict[str, list[Marked]]) -> list[Marked]:
    found = {mark.number: mark for tensor in box.tensors for mark in holders.get(tensor, ())}
    return list(found.values())


def _colour(number: int, group: GroupLine) -> str:
    return "var(--frozen)" if group.frozen_because else f"hsl({number * TURN % 360:.0f} 62% 52%)"
