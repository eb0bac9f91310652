from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_same, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.graph.hooks import Call, run_with_hooks, visit


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.second(F.relu(self.first(x)))}


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_hooks_compute_the_value_of_their_node_and_outputs_keep_their_structure() -> None:
    program = trace(model := Two(), X)
    (relu,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.relu.default)
    made = run_with_hooks(program, (X,), {relu: lambda call: call.value(-call.args[0])})
    assert_same(made["scores"], model.second(F.relu(-model.first(X))))
    assert_same(run_with_hooks(program, (X,), {})["scores"], model(X)["scores"])


def test_a_visit_ends_at_the_last_node_with_a_hook() -> None:
    program = trace(model := Two(), X)
    first, second = (n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    seen: list[Any] = []

    def watch(call: Call) -> Any:
        seen.append(call.value())
        return seen[-1]

    def fail(call: Call) -> Any:
        raise AssertionError(f"{call.node} was computed")

    visit(program, (X,), {first: watch})
    with pytest.raises(AssertionError, match="was computed"):
        visit(program, (X,), {first: watch, second: fail})
    seen.clear()
    visit(program, (X,), {first: watch})
    (value,) = seen
    assert_same(value, model.first(X))
    visit(program, (X,), {})
    assert len(seen) == 1


def test_errors_name_the_node() -> None:
    program = trace(Two(), X)
    (relu,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.relu.default)
    with pytest.raises(RuntimeError) as caught:
        run_with_hooks(program, (X,), {relu: lambda call: call.value(call.args[0][:, :1])})
    assert "while computing" in caught.value.__notes__[0]


def test_readers_of_a_tensor_are_found_under_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    program = trace(model, X)
    calls = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert list(program.readers("0.weight")) == calls
    assert list(program.readers("2.bias")) == calls[1:]
