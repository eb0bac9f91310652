from __future__ import annotations

import torch
from support import randomise_norms
from test_training import context, network, task
from torch import nn

from fxprune import trace
from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.text import graph_text
from fxprune.passes.finetune import Finetune
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome


def test_trains_and_keeps_the_graph_and_the_masks() -> None:
    x, y = task()
    program = trace(network(), (x[:2],))
    program.put(MASKS, Masks({}, "none"))
    before = graph_text(program)
    outcome = Finetune(epochs=8, lr=0.1, batch_size=16, distill=0)(program, context())
    assert graph_text(program) == before
    assert MASKS.name in program.facts
    assert outcome.changes == 6
    losses = [epoch["loss"] for epoch in outcome.details["epochs"]]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert float((program(x).argmax(1) == y).double().mean()) > 0.95


def test_no_epochs_change_nothing_and_need_no_data() -> None:
    program = trace(network(), (task()[0][:2],))
    state = {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}
    assert Finetune(epochs=0)(program, Context()).changes == 0
    assert all(torch.equal(state[k], v) for k, v in program.graph_module.state_dict().items())


def test_the_dense_model_is_left_alone() -> None:
    program = trace(network(), (task()[0][:2],))
    given = context(program)
    assert given.dense is not None
    before = {k: v.clone() for k, v in given.dense.graph_module.state_dict().items()}
    Finetune(batch_size=16)(program, given)
    after = given.dense.graph_module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_begins_where_evaluation_is() -> None:
    x, _ = task()
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    program = trace(randomise_norms(model), (x[:2],))
    step = Finetune(lr=1e-9, batch_size=len(x), distill=1, held_out=0)
    (epoch,) = _epochs(step(program, context(program)))
    assert epoch["loss"] < 1e-4  # what training mode is away from the dense model


def _epochs(outcome: Outcome) -> list[dict[str, float]]:
    found: list[dict[str, float]] = outcome.details["epochs"]
    return found
