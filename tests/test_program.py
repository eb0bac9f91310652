from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import Design, Network, designs
from support import assert_same, trace
from torch import nn

import fxprune
from fxprune.errors import PostconditionError, PreconditionError
from fxprune.graph.capture_check import check_capture
from fxprune.graph.program import Fact, Program, shape_of

ANSWER = Fact[int]("answer")


def program() -> Program:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return trace(model, torch.randn(2, 3, 4, 4))


def test_facts_are_found_under_their_names() -> None:
    made = program()
    with pytest.raises(PreconditionError, match="no fact 'answer'; run the pass"):
        made.get(ANSWER)
    made.put(ANSWER, 42)
    copied = made.copy()
    copied.put(ANSWER, 43)
    assert (made.get(ANSWER), copied.get(ANSWER)) == (42, 43)


def test_copies_are_independent() -> None:
    made = program()
    x = torch.randn(2, 3, 4, 4)
    expected = made(x)
    made.copy().tensor("0.weight").data.zero_()
    assert_same(made(x), expected)


def test_training_switches_norms_and_dropouts_and_back() -> None:
    torch.manual_seed(0)
    made = program()
    x = torch.randn(64, 3, 4, 4)
    still = made(x)
    made.train()
    mean = made.tensor("1.running_mean").clone()
    dropped = made(x)
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    assert not torch.equal(made.tensor("1.running_mean"), mean)
    made.tensor("1.running_mean").copy_(mean)
    made.eval()
    assert made(x).shape == still.shape
    assert float((made(x) == 0).float().mean()) < 0.3


def test_a_norm_without_statistics_stays_in_its_mode() -> None:
    made = trace(nn.InstanceNorm2d(3), torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    expected = made(x)
    assert_same(made.train()(x), expected)
    assert_same(made.eval()(x), expected)


def test_a_wrong_shape_is_found_and_named() -> None:
    made = program()
    made.verify()
    conv = next(node for node in made.graph.nodes if "conv2d" in node.name)
    assert shape_of(conv) == (2, 4, 4, 4)
    conv.meta["val"] = conv.meta["val"][:, :3]
    with pytest.raises(
        PostconditionError, match=r"node conv2d was recorded with the shape \(2, 3, 4, 4\)"
    ):
        made.verify()


def test_a_graph_that_cannot_run_is_found() -> None:
    made = program()
    made.graph_module.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 5, 1, 1))
    with pytest.raises(PostconditionError, match="does not run on fake tensors"):
        made.refresh()


@given(designs())
def test_every_tensor_of_the_model_is_read_by_its_name(design: Design) -> None:
    network = Network(design)
    made = trace(network, network.example())
    state = network.state_dict()
    network(network.example()).sum().backward()
    learns = {name for name, weight in network.named_parameters() if weight.grad is not None}
    read = {str(node.target) for node in made.tensor_nodes()}
    assert read >= learns
    for name in read.intersection(state):
        assert torch.equal(made.tensor(name), state[name])


def test_cost_needs_no_run() -> None:
    with torch.device("meta"):
        model = nn.Linear(100_000, 100_000)
    made = fxprune.trace(model, (torch.zeros(1, 100_000, device="meta"),))
    assert fxprune.cost(made).params == 100_000 * 100_001
    (note,) = check_capture(model, made, [made.example_inputs])
    assert "not compared" in note
