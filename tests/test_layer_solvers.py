from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn

import fxprune.reconstruction.layer_solvers
from fxprune.calibration.layer_matrix import layers
from fxprune.graph.facts import Removed
from fxprune.graph.program import Program
from fxprune.reconstruction.layer_solvers import (
    LayerProblem,
    SolverSettings,
    descend,
    refit,
    restrict,
)
from fxprune.reconstruction.lookahead import Solver
from fxprune.reconstruction.region import comparable, cut

GENERATOR = torch.Generator().manual_seed(0)
SAMPLES, MIX = (torch.randn(n, 6, generator=GENERATOR, dtype=torch.float64) for n in (64, 6))
X = SAMPLES @ MIX / 3  # inputs that know of each other
SETTINGS = SolverSettings(steps=8, cg_steps=60, damping=0.0, tolerance=1e-8)


def site(batches: int = 2, *, masked: bool = True) -> tuple[Program, LayerProblem]:
    """A masked layer, and what the dense one before a smooth function came to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    program = trace(model, X[:2])
    dense = program.copy()
    first = next(iter(layers(program)))
    region = cut(first, 3, comparable(program, dense))
    assert region is not None
    keep = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    parts = X.tensor_split(batches)

    def batch(number: int) -> tuple[Any, list[Tensor]]:
        frontier: Any = {place: parts[number]}
        values = region.run(dense, frontier, {})
        return frontier, [values[node] for node in region.outputs]

    stored = {"0.weight", "0.bias", "2.weight", "2.bias"}
    later = {name: dense.tensor(name).detach() for name in stored}
    if masked:
        with torch.no_grad():
            program.tensor("0.weight").mul_(keep)
    judged = range(batches - 1, batches) if batches > 1 else range(1)
    fitted = range(max(batches - 1, 1))
    return program, LayerProblem(
        program, region, {"0.weight": keep}, batch, fitted, judged, dense=later
    )


def slope(program: Program, place: LayerProblem, *, weighted: bool) -> float:
    """How steep the sum of squared differences is in the weights that may change."""
    weight = program.tensor("0.weight").detach().clone().requires_grad_()
    frontier, wanted = place.batch(0)
    with torch.enable_grad():
        values = place.region.run(program, frontier, {"0.weight": weight})
        parts = [
            (values[node] - value).square().sum() / (value.square().sum() if weighted else 1)
            for node, value in zip(place.region.outputs, wanted, strict=True)
        ]
        (found,) = torch.autograd.grad(torch.stack(parts).sum(), weight)
    return float((found * place.keep["0.weight"]).norm())


@torch.no_grad()
@pytest.mark.parametrize("solver", ["own", "paper"])
def test_ends_where_the_slope_is_zero(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.reconstruction.layer_solvers, "MIN_RELATIVE_DECREASE", 0.0)
    program, place = site(batches=1)
    steep = slope(program, place, weighted=solver == "own")
    found = descend(place, replace(SETTINGS, steps=20, solver=solver))
    assert found is not None
    assert found.after < found.before
    assert found.cg_steps > 0
    assert not program.tensor("0.weight")[~place.keep["0.weight"]].any()
    assert slope(program, place, weighted=solver == "own") < 0.02 * steep


@torch.no_grad()
def test_the_paper_changes_nothing_but_the_weight() -> None:
    program, place = site()
    bias = program.tensor("0.bias").clone()
    assert descend(place, replace(SETTINGS, solver="paper")) is not None
    assert torch.equal(program.tensor("0.bias"), bias)
    program, place = site()
    assert descend(place, SETTINGS) is not None
    assert not torch.equal(program.tensor("0.bias"), bias)


@torch.no_grad()
def test_the_paper_sees_later_layers_as_in_the_dense_program() -> None:
    found = []
    for spoilt in (False, True):
        program, place = site()
        if spoilt:
            program.tensor("2.weight").zero_()
        assert descend(place, replace(SETTINGS, solver="paper")) is not None
        found.append(program.tensor("0.weight").clone())
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["own", "paper"])
def test_nothing_to_mend(solver: Solver) -> None:
    program, place = site(masked=False)
    before = program.tensor("0.weight").clone()
    assert descend(place, replace(SETTINGS, solver=solver)) is None
    assert torch.equal(program.tensor("0.weight"), before)


@torch.no_grad()
def test_solving_never_raises_the_error_on_samples_held_out() -> None:
    program, place = site(batches=3)
    near = cut(place.region.layer, 0, comparable(program, program.copy()))
    assert near is not None

    def batch(number: int) -> tuple[Any, list[Tensor]]:
        frontier, wanted = place.batch(number)
        return frontier, wanted[:1]

    found = refit(replace(place, region=near, batch=batch), 1e-3)
    assert found is not None
    assert found.after < found.before
    assert not program.tensor("0.weight")[~place.keep["0.weight"]].any()


def test_what_removal_leaves_of_a_value() -> None:
    (node,) = (n for n in trace(nn.ReLU(), X[:2]).graph.nodes if n.op == "call_function")
    removed = Removed({node.name: {1: torch.tensor([0, 4])}})
    assert torch.equal(restrict(X, node, removed), X[:, [0, 4]])
    assert restrict(X, node, None) is X
    assert restrict(X, node, Removed({})) is X
