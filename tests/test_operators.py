from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, fx, nn

import fxprune
from fxprune.graph.functionalize import is_view
from fxprune.graph.operators import FAMILIES, operator_of, packets
from fxprune.graph.program import Program
from fxprune.structure.flow import Flow
from fxprune.structure.groups import Group
from fxprune.structure.labels import Labels
from fxprune.structure.reads import NotCovered
from fxprune.structure.rules import registry
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten


@torch.library.custom_op("tests::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    """Halve every element."""
    return x / 2


@halve.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


HALVE = torch.ops.tests.halve


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(halve(self.first(x)))  # type: ignore[no-any-return]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr("fxprune.graph.operators._registered", {})
    monkeypatch.setattr(registry, "_registered", {})
    return trace(Halved(), torch.randn(2, 4))


def hidden(program: Program) -> Group:
    (group,) = (g for g in fxprune.find_groups(program) if "first.weight:0" in map(str, g.slots))
    return group


def test_every_operator_has_one_record() -> None:
    names = [name for _, text in FAMILIES for name in text.split()]
    assert len(names) == len(set(names))
    assert packets("conv2d no_such_operator") == [aten.conv2d]


@pytest.mark.parametrize("name", [n for r, text in FAMILIES if r.moves_data for n in text.split()])
def test_what_moves_data_makes_no_new_values(name: str) -> None:
    calls: dict[str, tuple[Any, ...]] = {
        "view": ([4, 6],), "reshape": ([4, 6],), "_unsafe_view": ([4, 6],), "flatten": (1,),
        "unflatten": (1, [3, 2]), "unsqueeze": (0,), "expand": ([5, 4, 6],),
        "broadcast_to": ([5, 4, 6],), "permute": ([1, 0],), "transpose": (0, 1),
        "movedim": (0, 1), "moveaxis": (0, 1), "swapaxes": (0, 1), "swapdims": (0, 1),
        "split_with_sizes": ([2, 4], 1), "split": (3, 1), "chunk": (2, 1), "tensor_split": (3, 1),
        "unbind": (0,), "slice": (1, 1, 5, 2), "select": (0, 2), "narrow": (1, 2, 3),
        "roll": ([1], [1]), "flip": ([1],), "repeat": ([2, 3],), "tile": ([2, 1],),
        "repeat_interleave": (2, 1), "pad": ([1, 2],), "constant_pad_nd": ([1, 2],),
    }  # fmt: skip
    shape: tuple[int, ...] = {"pixel_shuffle": (1, 4, 3, 3), "pixel_unshuffle": (1, 1, 4, 4),
             "channel_shuffle": (1, 4, 2, 2)}.get(name, (4, 6))  # fmt: skip
    if "reflection" in name or "replication" in name:
        shape = (2, *[5] * (int(name[-2]) + 1))
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    numbers = [1] * 2 * int(name[-2]) if name.startswith(("refl", "repl")) else 2
    given = calls.get(name, (x,) if name.endswith("_as") else ())
    if "shuffle" in name:
        given = (2,)
    elif name.startswith(("reflection", "replication")):
        given = (numbers,)
    made = getattr(aten, name)(x, *given)
    for part in made if isinstance(made, (list, tuple)) else [made]:
        assert set(part.flatten().tolist()) <= {0.0, *x.flatten().tolist()}


@pytest.mark.parametrize("call", [aten.movedim.int, aten.contiguous.default, aten.relu.default])
def test_views_are_those_of_the_schema(call: Any) -> None:
    graph = fx.Graph()
    node = graph.call_function(call, (graph.placeholder("x"),))
    assert is_view(node) == (call is not aten.relu.default)


def test_a_pointwise_operator_needs_no_rule(program: Program) -> None:
    assert "no rule is known" in (hidden(program).frozen_because or "")
    fxprune.operator_rule(HALVE, pointwise=True)
    group = hidden(program)
    assert group.frozen_because is None
    assert fxprune.verify_removal(program, {group: [0, 3]}).error == pytest.approx(0, abs=1e-6)


def test_all_properties_can_be_registered(program: Program) -> None:
    before = fxprune.cost(program).macs

    @fxprune.operator_rule(
        HALVE, macs=lambda node: [((node, 0), (node, 1))], piecewise_linear=True, free=True
    )
    def rule(flow: Flow, node: fx.Node) -> Labels:
        return flow.labels(node.args[0])

    (node,) = program.graph.find_nodes(op="call_function", target=HALVE.default)
    assert (operator_of(node).piecewise_linear, operator_of(node).free) == (True, True)
    assert operator_of(node).moves_data is False
    assert fxprune.cost(program).macs == before + 8
    assert hidden(program).frozen_because is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (NotCovered("only in three dimensions"), "does not cover this call: only in three"),
        (ZeroDivisionError("division"), "the registered rule of tests.halve.default failed"),
    ],
)
def test_a_registered_rule_that_fails_freezes(
    program: Program, fault: Exception, reason: str
) -> None:
    @fxprune.operator_rule(HALVE)
    def rule(flow: Flow, node: fx.Node) -> Labels:
        raise fault

    assert reason in (hidden(program).frozen_because or "")


def test_a_fault_in_a_rule_of_ours_is_raised(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(flow: Flow, node: fx.Node) -> Labels:
        raise ValueError("a fault")

    monkeypatch.setitem(registry._OWN, HALVE, OperatorRule(rule))
    with pytest.raises(ValueError, match="a fault") as caught:
        fxprune.find_groups(program)
    assert "please report it" in caught.value.__notes__[0]
