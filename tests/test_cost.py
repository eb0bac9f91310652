from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import Design, Network, designs
from support import trace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.graph.cost import activation_bytes


@given(designs())
def test_macs_are_half_of_the_flops_that_torch_counts(design: Design) -> None:
    network = Network(design).eval()
    x = network.example(2)
    program = trace(network, x)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # it has no count for the others
        program(x)  # what is computed in vain is not in it
    assert fxprune.cost(program).macs * len(x) * 2 == counter.get_total_flops()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(7, 7)
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x) * self.scale.float())  # type: ignore[no-any-return]


def test_what_is_tied_counts_once_and_what_is_unused_not_at_all() -> None:
    found = fxprune.cost(fxprune.trace(Tied(), (torch.zeros(2, 3, dtype=torch.int64),)))
    assert found.params == 40
    assert found.weight_bytes == 40 * 4 + 4 * 8
    assert found.macs == 3 * 4 * 10


@pytest.mark.parametrize("batch", [1, 5])
def test_incremental_run_are_counted_for_one_sample(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    program = fxprune.trace(model, (torch.zeros(batch, 3, 4, 4),))
    assert activation_bytes(program) == 3 * 8 * 4 * 4 * 4
