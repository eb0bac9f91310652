from __future__ import annotations

import torch
from support import trace
from torch import Tensor, nn

from fxprune import find_groups
from fxprune.context import Context
from fxprune.data import Data
from fxprune.datasets import Arrays
from fxprune.facts import SENSITIVITY, Slot
from fxprune.graph_text import graph_text
from fxprune.passes.annotate_sensitivity import META, AnnotateSensitivity


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        made: Tensor = self.head(self.second(x).relu().mean((2, 3)))
        return made


def context() -> Context:
    x = torch.randn(12, 3, 8, 8)
    return Context(data=Data(Arrays(x, torch.randint(4, (12,)))))


def test_every_removable_group_has_scores_and_the_graph_stays() -> None:
    program = trace(Branches(), torch.randn(2, 3, 8, 8))
    before = graph_text(program)
    step = AnnotateSensitivity("hessian-trace", estimator="outputs", probes=16)
    outcome = step(program, context())
    assert (outcome.changes, outcome.skips, graph_text(program)) == (0, (), before)
    found = program.get(SENSITIVITY)
    removable = {g.name: len(g.units) for g in find_groups(program) if g.frozen_because is None}
    assert {name: len(scores) for name, scores in found.scores.items()} == removable
    assert {name: len(errors) for name, errors in found.errors.items()} == removable
    assert found.details["probes"] == 16
    assert outcome.details is not None
    assert outcome.details["criterion"] == found.criterion


def test_parameter_nodes_carry_the_scores_of_their_units() -> None:
    program = trace(Branches(), torch.randn(2, 3, 8, 8))
    AnnotateSensitivity(criterion="fisher")(program, context())
    scores = program.get(SENSITIVITY).scores
    groups = {group.name: group for group in find_groups(program)}
    nodes = {str(node.target): node for node in program.tensor_nodes()}
    for name, part in scores.items():
        for slot in groups[name].slots:
            if slot.tensor not in nodes or META not in nodes[slot.tensor].meta:
                continue
            units, indices = groups[name].places(slot)
            shown = nodes[slot.tensor].meta[META][slot.dim]
            assert torch.equal(shown[torch.from_numpy(indices)], part[torch.from_numpy(units)])
    assert set(nodes["second.weight"].meta[META]) == {0, 1}
    assert META not in nodes["norm.running_mean"].meta


def test_groups_that_the_criterion_cannot_score_are_declined() -> None:
    program = trace(Branches(), torch.randn(2, 3, 8, 8))
    outcome = AnnotateSensitivity(criterion="bn-scale")(program, context())
    (skip,) = outcome.skips
    assert (skip.node, skip.reason) == ("second.weight:0", "no batch norm scales its units")
    assert set(program.get(SENSITIVITY).scores) == {"first.weight:0"}
    gamma = program.tensor("norm.weight").detach().abs().double()
    torch.testing.assert_close(program.get(SENSITIVITY).scores["first.weight:0"], gamma)


def test_options_survive_being_written_and_read() -> None:
    step = AnnotateSensitivity(criterion="taylor", samples=64, precision="bf16")
    assert str(step) == "annotate-sensitivity{criterion=taylor,precision=bf16,samples=64}"


def test_the_same_seed_gives_the_same_scores() -> None:
    torch.manual_seed(0)
    program = trace(Branches(), torch.randn(2, 3, 8, 8))
    here = context()
    found = []
    for _ in range(2):
        AnnotateSensitivity("hessian-trace", estimator="weights", probes=8)(program, here)
        found.append(torch.cat(list(program.get(SENSITIVITY).scores.values())))
    assert torch.equal(*found)


def test_a_unit_holds_an_element_once_though_it_meets_it_along_two_dimensions() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 4)
            self.mix = nn.Linear(4, 4, bias=False)
            self.down = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            made: Tensor = self.down(x + self.mix(x))
            return made

    program = trace(Square(), torch.randn(2, 3))
    data = Context(data=Data(Arrays(torch.randn(8, 3), torch.randint(2, (8,)))))
    AnnotateSensitivity(criterion="magnitude-l1")(program, data)
    (scores,) = program.get(SENSITIVITY).scores.values()
    w = {name: program.tensor(name).detach().abs() for name in
         ("up.weight", "up.bias", "mix.weight", "down.weight")}  # fmt: skip
    mix = w["mix.weight"]
    total = w["up.weight"].sum(1) + w["up.bias"] + w["down.weight"].sum(0)
    total = total + mix.sum(0) + mix.sum(1) - mix.diagonal()
    torch.testing.assert_close(scores.float(), total / total.mean())
    (group,) = (g for g in find_groups(program) if g.frozen_because is None)
    assert Slot("mix.weight", 1) in group.slots
