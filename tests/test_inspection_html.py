from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from blocks import Step
from strategies import Design, Network
from support import trace

from fxprune.report.inspection import inspect
from fxprune.report.inspection_html import inspection_html

DESIGN = Design(tuple(map(Step, ("residual", "split", "attention", "gate"))), "flattened")


def test_the_drawing_shows_every_group_where_its_tensors_are_read() -> None:
    network = Network(DESIGN)
    program = trace(network, network.example())
    found = inspect(program)
    page = inspection_html(program, found)
    drawn = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    boxes = [item for item in drawn.iter("g") if item.get("class") == "box"]
    in_boxes = {int(number) for box in boxes for number in (box.get("data-groups") or "").split()}
    rows = {int(number) for number in re.findall(r'<tr data-group="(\d+)"', page)}
    assert rows == in_boxes == set(range(1, len(found.groups) + 1))
    for group in found.groups:
        assert group.name in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_names_are_escaped() -> None:
    network = Network(DESIGN)
    program = trace(network, network.example())
    found = inspect(program)
    group = found.groups[0]
    object.__setattr__(group, "frozen_because", "<script>alert(1)</script>")
    assert "<script>alert" not in inspection_html(program, found)
