from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import Design, Network, designs
from support import assert_same, randomise_norms, trace, without_readers
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import InputError
from fxprune.planning.cost_model import cost_model
from fxprune.structure.groups import Group
from fxprune.structure.verify import sample_units


def removable(program: fxprune.Program) -> list[Group]:
    return [group for group in fxprune.find_groups(program) if group.frozen_because is None]


@given(designs())
def test_removal_equals_never_having_read(design: Design) -> None:
    network = Network(design)
    x = network.example()
    program = trace(network, x)
    chosen = sample_units(fxprune.find_groups(program), 0.5, design.seed)
    exact = {group: units for group, units in chosen.items() if not group.mixed_by}
    expected = without_readers(network, exact)(x)
    fxprune.remove_units(program, exact)
    assert_same(program(x), expected)


@given(designs())
def test_zero_then_remove_is_exact_wherever_it_applies(design: Design) -> None:
    network = Network(design)
    program = trace(network, network.example())
    for group, units in sample_units(fxprune.find_groups(program), 0.3, design.seed).items():
        found = fxprune.verify_removal(program, {group: units})
        if group.mixed_by:
            assert found.error is None
            assert found.reason is not None
        else:
            assert found.error is not None
            assert found.error <= 1e-10


@given(designs())
def test_costs_in_closed_form_equal_the_costs_of_the_cut_program(design: Design) -> None:
    network = Network(design)
    program = trace(network, network.example())
    groups = fxprune.find_groups(program)
    model = cost_model(program, groups)
    chosen = sample_units(groups, 0.5, design.seed)
    predicted = model.quantities(np.array([len(chosen.get(group, ())) for group in groups]))
    fxprune.remove_units(program, chosen)
    assert asdict(fxprune.cost(program)) == {k: round(value) for k, value in predicted.items()}


@given(designs())
def test_a_cut_program_runs_at_other_batch_sizes_and_learns(design: Design) -> None:
    network = Network(design)
    program = trace(network, network.example())
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5, design.seed))
    output = program(network.example(3))
    output.square().sum().backward()
    read = {str(node.target) for node in program.tensor_nodes()}
    parameters = dict(program.graph_module.named_parameters())
    assert all(
        parameters[name].grad is not None for name in read & set(parameters) if output.numel()
    )


class PaddedShortcut(nn.Module):
    """The shortcut of CIFAR ResNets: stride 2, new channels are zeros on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.norm(self.conv(x)) + shortcut)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def test_padded_shortcuts_are_removable_and_their_padding_shrinks() -> None:
    model = randomise_norms(PaddedShortcut()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    program = trace(model, x)
    stage = next(group for group in removable(program) if group.name == "conv.weight:0")
    assert len(stage.units) == 8  # the padding; the other eight live with the stem
    doomed = {stage: [0, 1, 7]}
    expected = without_readers(model, doomed)(x)
    fxprune.remove_units(program, doomed)
    (pad,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.pad.default)
    assert pad.args[1] == [0, 0, 0, 0, 2, 3]
    assert_same(program(x), expected)


@pytest.mark.parametrize(("groups", "units"), [(8, 8), (4, 4)])
def test_groups_of_a_norm_go_whole(groups: int, units: int) -> None:
    norm = nn.GroupNorm(groups, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 3)).double()
    program = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    (group,) = removable(program)
    assert len(group.units) == units
    found = fxprune.verify_removal(program, {group: [0, 2]})
    assert found.error is not None
    assert found.error <= 1e-10
    fxprune.remove_units(program, {group: [0, 2]})
    (node,) = [node for node in program.graph.nodes if "group_norm" in str(node.target)]
    assert node.args[1] == groups - 2


class Tied(nn.Module):
    """The width of an embedding is what the last layer, of the same weight, reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        result: Tensor = self.head(x + F.relu(self.mix(x)))
        return result


@pytest.mark.parametrize("names", [1, 2])
def test_tied_weights_are_cut_once(names: int) -> None:
    program = trace(Tied().double(), torch.randint(10, (2, 5)))
    (weight,) = [n for n in program.tensor_nodes() if n.meta["val"].shape == (10, 8)]
    if names == 2:  # as in programs that were exported elsewhere
        other = ({"embedding.weight", "head.weight"} - {str(weight.target)}).pop()
        with program.graph.inserting_after(weight):
            alias = program.graph.get_attr(other)
        next(iter(weight.users)).replace_input_with(weight, alias)
        program.refresh()
    (group,) = removable(program)
    found = fxprune.verify_removal(program, {group: [1, 6, 7]})
    assert found.error is not None
    assert found.error <= 1e-10
    fxprune.remove_units(program, {group: [1, 6, 7]})
    read = [str(n.target) for n in program.tensor_nodes() if n.meta["val"].shape == (10, 5)]
    assert len(read) == names
    assert len({id(program.tensor(name)) for name in read}) == 1


def test_removing_nothing_changes_nothing() -> None:
    program = trace(PaddedShortcut(), torch.randn(1, 3, 8, 8))
    before = {name: t.clone() for name, t in program.graph_module.state_dict().items()}
    code = program.graph_module.code
    assert fxprune.remove_units(program, {group: [] for group in removable(program)}) == 0
    assert program.graph_module.code == code
    assert all(
        torch.equal(t, before[name]) for name, t in program.graph_module.state_dict().items()
    )


def test_the_users_model_is_left_alone() -> None:
    model = PaddedShortcut().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    program = trace(model, torch.randn(1, 3, 8, 8))
    fxprune.remove_units(program, sample_units(fxprune.find_groups(program), 0.5))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_frozen_groups_and_whole_groups_are_refused() -> None:
    program = trace(PaddedShortcut(), torch.randn(1, 3, 8, 8))
    groups = {group.name: group for group in fxprune.find_groups(program)}
    with pytest.raises(InputError, match="is frozen: it is an output of the model"):
        fxprune.remove_units(program, {groups["head.weight:0"]: [0]})
    with pytest.raises(InputError, match="would lose all of its 8 units"):
        fxprune.remove_units(program, {groups["stem.weight:0"]: range(8)})
    with pytest.raises(InputError, match="has units 0 to 7"):
        fxprune.remove_units(program, {groups["stem.weight:0"]: [8]})


def test_groups_of_a_program_that_has_changed_are_refused() -> None:
    program = trace(PaddedShortcut(), torch.randn(1, 3, 8, 8))
    stem = removable(program)[0]
    fxprune.remove_units(program, {stem: [0]})
    with pytest.raises(InputError, match="find the groups again"):
        fxprune.remove_units(program, {stem: [1]})


def test_what_is_left_is_recorded_over_several_cuts() -> None:
    model = PaddedShortcut()
    program = trace(model, torch.randn(1, 3, 8, 8))
    for _ in range(2):
        fxprune.remove_units(program, {removable(program)[0]: [1]})
    left = program.get(fxprune.graph.facts.REMOVED).kept["stem_weight"][0]
    assert left.tolist() == [0, 3, 4, 5, 6, 7]
    assert torch.equal(program.tensor("stem.weight"), model.stem.weight[left])


def test_layer_norm_is_said_to_mix() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    program = trace(model, torch.randn(2, 6))
    (group,) = removable(program)
    found = fxprune.verify_removal(program, {group: [0]})
    assert found.error is None
    assert "layer_norm" in str(found.reason)
    fxprune.remove_units(program, {group: [0, 5]})
    assert program(torch.randn(4, 6)).shape == (4, 3)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.cells = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.leave(self.cells(self.enter(x))[0])
        return result


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_units_go_with_their_gates_and_states(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    program = trace(Recurrent(kind).double(), x)
    groups = removable(program)
    assert sorted(len(group.units) for group in groups) == [6, 8]
    found = fxprune.verify_removal(program, {group: [0, 3] for group in groups})
    assert found.error is not None
    assert found.error <= 1e-10


def test_an_unknown_operator_freezes_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(
                torch.linalg.matrix_exp(self.a(x).diag_embed()).diagonal(0, -2, -1)
            )
            return result

    program = trace(Sorted(), torch.randn(2, 4))
    reasons = [g.frozen_because for g in fxprune.find_groups(program) if g.name == "a.weight:0"]
    assert reasons[0] is not None
    assert "no rule is known for operator aten." in reasons[0]
    assert "operator_rule" in reasons[0]
