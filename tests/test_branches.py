from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import Design, Network, designs
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.text import graph_text
from fxprune.structure.branches import Branch, find_branches, remove_branch, silence_error


class Block(nn.Module):
    """A residual block, whose addition can be bent in many ways."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(x)
        y = torch.relu(self.one(x))
        z = self.two(y)
        match self.kind:
            case "read elsewhere":
                return torch.relu(x + z) * y.mean()
            case "scaled":
                return torch.relu(torch.add(x, z, alpha=2))
            case "broadcast":
                return torch.relu(x + z.mean((2, 3), keepdim=True))
            case "constant":
                return torch.relu(x + 1) + self.two(self.one(torch.ones_like(x)))
            case "doubled":
                return torch.relu(z + z)
            case "no weights":
                return torch.relu(x + F.max_pool2d(x, 3, 1, 1))
        return torch.relu(z + x)


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def branches_of(model: nn.Module) -> tuple[Branch, ...]:
    return find_branches(trace(model.eval(), X))


def test_a_block_goes_with_its_tensors_and_the_relu_behind_it() -> None:
    program = trace(nn.Sequential(Block(), nn.Conv2d(4, 2, 1)).eval(), X)
    (branch,) = find_branches(program)
    assert branch.title == "0 (one, two)"
    assert branch.weights == ("0.one.weight", "0.one.bias", "0.two.weight", "0.two.bias")
    remove_branch(program, branch)
    assert graph_text(program).splitlines() == [
        "input_1: 2x4x5x5 = input",
        "relu: 2x4x5x5 = relu(input_1)",
        "conv2d_2: 2x2x5x5 = conv2d(relu, <1.weight 2x4x1x1>, <1.bias 2>)",
        "return conv2d_2",
    ]
    assert set(program.graph_module.state_dict()) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    "kind", ["read elsewhere", "scaled", "broadcast", "constant", "doubled", "no weights"]
)
def test_what_is_no_closed_branch_stays(kind: str) -> None:
    assert branches_of(Block(kind)) == ()


def test_attention_and_mlp_are_branches_of_their_own() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    program = trace(layer.eval(), torch.randn(2, 3, 8))
    attention, mlp = find_branches(program)
    assert {name.split(".")[0] for name in attention.weights} == {"norm1", "self_attn"}
    assert {name.split(".")[0] for name in mlp.weights} == {"norm2", "linear1", "linear2"}


def test_silence_is_not_what_a_branch_says() -> None:
    program = trace(nn.Sequential(Block(), nn.Conv2d(4, 2, 1)).eval(), X)
    assert silence_error(program, find_branches(program), program) > 1e-3
    assert silence_error(program, [], program) == 0


def test_masks_of_what_went_go_too() -> None:
    program = trace(nn.Sequential(Block(), nn.Conv2d(4, 2, 1)).eval(), X)
    keep = {name: torch.ones(1) for name in ("0.one.weight", "1.weight")}
    program.put(MASKS, Masks(keep, "any"))
    remove_branch(program, find_branches(program)[0])
    assert list(program.get(MASKS).keep) == ["1.weight"]


@settings(max_examples=60)
@given(designs())
def test_removal_is_silence(design: Design) -> None:
    network = Network(design)
    x = network.example()
    program = trace(network, x)
    for branch in find_branches(program)[:2]:
        smaller = program.copy()
        (same,) = (b for b in find_branches(smaller) if b.add.name == branch.add.name)
        remove_branch(smaller, same)
        assert silence_error(program, [branch], smaller) < 1e-10
        assert not set(branch.weights) & set(smaller.graph_module.state_dict())
