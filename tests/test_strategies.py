from __future__ import annotations

import pytest
import torch
from blocks import BLOCKS, Step
from hypothesis import given
from strategies import HEADS, Design, Network, designs
from support import assert_same, trace


@given(designs())
def test_every_design_builds_a_network_that_runs(design: Design) -> None:
    network = Network(design)
    outputs = network(network.example(3))
    assert outputs.shape[0] == 3
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_step_is_captured_as_it_is(kind: str) -> None:
    design = Design((Step("conv"), Step(kind, 0, 1, 8), Step(kind, 1, 0, 12)), "flattened")
    network = Network(design)
    program = trace(network, network.example(2))
    with torch.no_grad():
        assert_same(program(network.example(3)), network(network.example(3)))


@pytest.mark.parametrize("head", HEADS)
def test_weights_depend_on_the_seed_alone(head: str) -> None:
    design = Design((Step("residual"), Step("attention")), head, 2)
    first, second = Network(design).state_dict(), Network(design).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
