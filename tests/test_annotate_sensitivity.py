from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import find_groups, remove_units
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.facts import SENSITIVITY, Slot
from fxprune.graph.program import Program
from fxprune.graph.text import graph_text
from fxprune.passes.annotate_sensitivity import META, AnnotateSensitivity
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome


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


class Heads(nn.Module):
    """A hidden layer without an activation, and outputs of any kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.hidden = nn.Conv2d(2, 6, 1)
        self.out = nn.Conv2d(6, 1 if kind == "single" else 3, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.out(self.hidden(x))
        match self.kind:
            case "pixels":
                return x
            case "several":
                return x.mean((2, 3)), x.square()
        return x.mean((2, 3))


def several(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], target) + outputs[1].mean()


def annotated(
    kind: str, loss: Any, target: Tensor | None, **options: Any
) -> tuple[Program, Program, Outcome]:
    torch.manual_seed(0)
    model, x = Heads(kind).double(), torch.randn(8, 2, 4, 4, dtype=torch.float64)
    program = trace(model, x[:2])
    dense = program.copy()
    outcome = AnnotateSensitivity(**options)(
        program, Context(data=Data(Arrays(x, target)), loss=loss)
    )
    return program, dense, outcome


PIXELS = torch.randint(3, (8, 4, 4), generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(8) % 3


@pytest.mark.parametrize(
    ("kind", "loss", "target", "used", "reason"),
    [
        ("pixels", F.cross_entropy, PIXELS, "gauss-newton", None),
        ("pixels", F.cross_entropy, None, "gauss-newton", None),
        ("values", F.mse_loss, VALUES, "gauss-newton", None),
        ("values", F.smooth_l1_loss, VALUES, "fisher", "curvature of this loss"),
        ("values", F.smooth_l1_loss, None, "output-shift", "no labels for this loss"),
        ("several", several, LABELS, "fisher", "curvature of this loss"),
        ("several", F.cross_entropy, LABELS, "output-shift", "several outputs"),
        ("single", F.cross_entropy, LABELS, "output-shift", "a single class"),
    ],
)
def test_gauss_newton_or_what_comes_nearest_takes_every_kind_of_model(
    kind: str, loss: Any, target: Tensor | None, used: str, reason: str | None
) -> None:
    program, _, outcome = annotated(kind, loss, target, criterion="gauss-newton")
    found = program.get(SENSITIVITY)
    assert found.criterion == used
    (scores,) = found.scores.values()
    assert scores.isfinite().all()
    assert (scores > 0).all()
    assert outcome.details["criterion"] == used
    notes = outcome.notes
    assert len(notes) == (0 if reason is None else 1)
    assert reason is None or (reason in notes[0] and f"{used} instead of gauss-newton" in notes[0])


@pytest.mark.parametrize("kind", ["pixels", "values", "several", "single"])
def test_the_default_takes_every_kind_of_model(kind: str) -> None:
    program, _, _ = annotated(kind, several, None)
    found = program.get(SENSITIVITY)
    assert found.criterion == AnnotateSensitivity().criterion
    (scores,) = found.scores.values()
    assert (scores.isfinite() & (scores > 0)).all()


@pytest.mark.parametrize(("kind", "error"), [("values", 1e-9), ("pixels", 0.25)])
def test_without_an_activation_gauss_newton_is_the_rise_of_a_squared_error(
    kind: str, error: float
) -> None:
    """The model is linear in each gate, so second order in the outputs is all there is."""
    program, dense, _ = annotated(
        kind, F.mse_loss, None, criterion="gauss-newton", output_probes=400
    )
    (scores,) = program.get(SENSITIVITY).scores.values()
    torch.manual_seed(0)
    Heads(kind).double()
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    for unit in range(6):
        small = dense.copy()
        (group,) = (group for group in find_groups(small) if group.frozen_because is None)
        remove_units(small, {group: [unit]})
        with torch.no_grad():
            rise = F.mse_loss(small(x), dense(x))
        assert float(scores[unit]) == pytest.approx(float(rise), rel=error)
