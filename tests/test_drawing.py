from __future__ import annotations

import itertools
import re

import pytest
from blocks import Step
from hypothesis import given
from strategies import Design, Network, designs
from support import trace

from fxprune.report.drawing import GAP_X, GAP_Y, WIDTH, Drawing, draw

NUMBER = re.compile(r"-?[\d.]+")


def drawn(design: Design) -> Drawing:
    network = Network(design)
    return draw(trace(network, network.example()))


@given(designs(max_steps=12))
def test_boxes_are_on_the_page_and_apart_and_lines_end_at_boxes(design: Design) -> None:
    drawing = drawn(design)
    for box in drawing.boxes:
        assert WIDTH / 2 - 1e-6 <= box.x <= drawing.width - WIDTH / 2 + 1e-6
        assert 0 <= box.y <= drawing.height - box.height + 1e-6
    for first, second in itertools.combinations(drawing.boxes, 2):
        if first.y == second.y:
            assert abs(first.x - second.x) >= WIDTH + GAP_X - 1e-6
        else:
            upper, lower = sorted((first, second), key=lambda box: box.y)
            assert lower.y - upper.y - upper.height >= GAP_Y - 1e-6
    starts, ends = set(), set()
    for path in drawing.paths:
        numbers = NUMBER.findall(path)
        starts.add((numbers[0], numbers[1]))
        ends.add((numbers[-2], numbers[-1]))
    lower_edges = {(f"{box.x:.1f}", f"{box.y + box.height:.1f}") for box in drawing.boxes}
    upper_edges = {(f"{box.x:.1f}", f"{box.y:.1f}") for box in drawing.boxes}
    assert starts & lower_edges
    assert ends & upper_edges
    assert starts - lower_edges == ends - upper_edges  # where a line passes a layer, it goes on


@given(designs())
def test_every_operator_and_every_parameter_is_in_one_box(design: Design) -> None:
    network = Network(design)
    program = trace(network, network.example())
    drawing = draw(program)
    shown = [word for box in drawing.boxes for line in box.lines[:-1] for word in line.split()]
    operators = [node for node in program.graph.nodes if node.op == "call_function"]
    named = [str(getattr(node.target, "_opname", node.target.__name__)) for node in operators]
    for name in set(named):
        assert shown.count(name) <= named.count(name)
    assert shown.count("conv2d") == named.count("conv2d")
    read = [tensor for box in drawing.boxes for tensor in box.tensors]
    assert set(read) == {node.target for node in program.graph.nodes if node.op == "get_attr"}


def test_a_residual_branch_stands_beside_its_shortcut() -> None:
    drawing = drawn(Design((Step("residual"), Step("relu")), "pooled"))
    assert len(drawing.boxes) >= 4
    assert drawing.width > WIDTH  # the shortcut has a lane of its own
    again = drawn(Design((Step("residual"), Step("relu")), "pooled"))
    assert again == drawing


@pytest.mark.parametrize("kind", ["attention", "shuffle"])
def test_shapes_and_matrices_are_shown(kind: str) -> None:
    drawing = drawn(Design((Step(kind), Step("conv")), "pooled"))
    text = "\n".join(line for box in drawing.boxes for line in box.lines)
    assert "\u2192 2\u00d73\u00d74\u00d74" in text
    assert "conv2d 8\u00d73\u00d73\u00d73" in text
