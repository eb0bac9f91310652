from __future__ import annotations

import torch
from support import assert_same
from torch import Tensor, nn

import fxprune
from fxprune.graph.surgery import (
    drop_unused,
    insert_call,
    read_tensor,
    replace_node,
    rewrite_call,
    set_tensor,
    unused_name,
)

aten = torch.ops.aten


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_tied_tensor_is_replaced_under_all_its_names() -> None:
    model = Tied()
    program = fxprune.trace(model, (X,))
    set_tensor(program, "second.weight", torch.zeros(4, 4))
    assert_same(program(X), model.second.bias.expand(3, 4))
    assert program.tensor("first.weight") is program.tensor("second.weight")
    assert isinstance(program.tensor("first.weight"), nn.Parameter)


def test_new_tensors_get_names_of_their_own() -> None:
    program = fxprune.trace(Tied(), (X,))
    assert unused_name(program, "first.extra") == "first.extra"
    assert unused_name(program, "first.bias") == "first.bias_1"
    set_tensor(program, "deep.down.scale", torch.ones(4, requires_grad=True))
    assert isinstance(program.tensor("deep.down.scale"), nn.Parameter)
    set_tensor(program, "deep.table", torch.ones(4))
    assert "deep.table" in dict(program.graph_module.named_buffers())


def test_calls_are_inserted_replaced_and_rewritten() -> None:
    model = Tied()
    program = fxprune.trace(model, (X,))
    relu = next(node for node in program.graph.nodes if node.target is aten.relu.default)
    source = relu.args[0]
    set_tensor(program, "shift", torch.full((4,), 0.25))
    shift = read_tensor(program, "shift", relu)
    moved = insert_call(program, relu, aten.add.Tensor, (source, shift))
    assert moved.meta["nn_module_stack"] == relu.meta["nn_module_stack"]
    replace_node(program, relu, moved)
    program.verify()
    expected = model.second(model.first(X) + 0.25)
    assert_same(program(X), expected)
    rewrite_call(program, moved, aten.sub.Tensor, (source, shift))
    program.verify()
    assert_same(program(X), model.second(model.first(X) - 0.25))


def test_what_nothing_reads_goes() -> None:
    program = fxprune.trace(Tied(), (X,))
    output = next(node for node in program.graph.nodes if node.op == "output")
    relu = next(node for node in program.graph.nodes if node.target is aten.relu.default)
    output.args = ((relu,),)
    drop_unused(program)
    program.refresh()
    # The second layer's weight is the first's, and stays under both names.
    assert set(program.graph_module.state_dict()) == {"first.weight", "first.bias", "second.weight"}
