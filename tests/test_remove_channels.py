from __future__ import annotations

import pytest
import torch
from support import randomise_norms, trace
from torch import nn

from fxprune.errors import PreconditionError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, REMOVED, SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.graph.text import graph_text
from fxprune.passes import RemoveChannels
from fxprune.pipeline.context import Context

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def planned(remove: dict[str, tuple[int, ...]]) -> Program:
    program = trace(randomise_norms(MODEL).eval(), torch.randn(2, 3, 6, 6))
    program.put(SENSITIVITY, Sensitivity("test", {}))
    program.put(PLAN, Plan(remove))
    return program


def test_removes_the_units_of_the_plan() -> None:
    program = planned({"0.weight:0": (1, 4, 6)})
    kept = [0, 2, 3, 5, 7]
    expected = {
        name: program.tensor(name).detach()[kept]
        for name in ("0.weight", "1.bias", "1.running_var")
    }
    read = program.tensor("3.weight").detach()[:, kept]
    before = cost(program)
    outcome = RemoveChannels()(program, Context())
    assert outcome.changes == 3
    assert cost(program).params < before.params
    for name, value in expected.items():
        assert torch.equal(program.tensor(name), value)
    assert torch.equal(program.tensor("3.weight"), read)
    assert program(torch.randn(5, 3, 6, 6)).shape == (5, 4, 4, 4)


def test_what_was_decided_before_the_cut_is_gone_after_it() -> None:
    program = planned({"0.weight:0": (0,)})
    RemoveChannels()(program, Context())
    assert set(program.facts) == {REMOVED.name, PLAN.name}
    assert program.get(PLAN) == Plan({})
    kept = program.get(REMOVED).kept
    assert all(
        indices.tolist() == list(range(1, 8)) for dims in kept.values() for indices in dims.values()
    )
    assert kept


def test_an_empty_plan_changes_nothing() -> None:
    program = planned({})
    text = graph_text(program)
    assert RemoveChannels()(program, Context()).changes == 0
    assert graph_text(program) == text
    assert PLAN.name in program.facts


def test_refuses_a_plan_of_another_program() -> None:
    program = planned({"7.weight:0": (0,)})
    with pytest.raises(PreconditionError, match=r"7.weight:0; plan again"):
        RemoveChannels()(program, Context())


def test_implants_follow_their_units() -> None:
    program = planned({"0.weight:0": (1, 4, 6)})
    implant = {"0.weight:0": (0, 3, 6, 7)}
    program.put(PLAN, Plan({"0.weight:0": (1, 4, 6)}, implant, ("a note",), kinds={"w": "pair:2"}))
    RemoveChannels()(program, Context())
    left = {"0.weight:0": (0, 2, 4)}
    assert program.get(PLAN) == Plan({}, left, ("a note",), kinds={"w": "pair:2"})
