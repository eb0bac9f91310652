"""Traces against full matrices and finite differences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sensitivity_nets import SIZE, Dense, build, context, samples
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from fxprune import find_groups, trace
from fxprune.data.batches import Batch
from fxprune.graph.program import Program
from fxprune.sensitivity.model import Objective, Weights
from fxprune.sensitivity.probes import Matrix, TraceProbes, piecewise_linear
from fxprune.sensitivity.scores import SensitivitySettings, measure
from fxprune.sensitivity.task import Task
from fxprune.sensitivity.units import UnitLayout


def full_matrix(program: Program, names: list[str], batch: Batch, loss: Any, matrix: Matrix) -> Any:
    """The whole Hessian or Gauss-Newton matrix over the flattened weights."""
    leaves = {name: program.tensor(name).detach() for name in names}
    shapes = [leaf.shape for leaf in leaves.values()]
    sizes = [leaf.numel() for leaf in leaves.values()]

    def outputs(flat: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        found = functional_call(
            program.graph_module, dict(zip(names, parts, strict=True)), batch.inputs
        )
        assert isinstance(found, Tensor)
        return found

    flat = torch.cat([leaf.flatten() for leaf in leaves.values()])
    if matrix == "hessian":
        return hessian(lambda w: loss(outputs(w), batch.target))(flat)
    made = outputs(flat)
    jacobian = jacrev(outputs)(flat).reshape(made.numel(), -1)
    curvature = hessian(lambda o: loss(o.view_as(made), batch.target))(made.flatten())
    return jacobian.T @ curvature @ jacobian


def unit_traces(layout: UnitLayout, names: list[str], program: Program, full: Tensor) -> Tensor:
    sizes = [program.tensor(name).numel() for name in names]
    parts = full.diagonal().split(sizes)
    values = {n: p.view_as(program.tensor(n)) for n, p in zip(names, parts, strict=True)}
    totals = [
        sum(
            float(values[tensor].detach()[(slice(None),) * dim + (index,)].sum())
            for tensor, dim, index in dict.fromkeys(
                (slot.tensor, slot.dim, index) for slot, index in unit.places
            )
            if tensor in values
        )
        for group in layout.groups
        for unit in group.units
    ]
    return torch.tensor(totals, dtype=torch.float64)


def basis(probes: TraceProbes, batch: Batch) -> Tensor:
    """Sum the samples over a complete set of basis vectors instead of random signs."""
    sample = probes.prepare(batch, torch.Generator())
    lengths = (
        [leaf.numel() for leaf in probes.weights.leaves.values()]
        if not probes.outputs
        else [probes.program(*batch.inputs).numel()]
    )
    total = torch.zeros(len(probes.layout), dtype=torch.float64)
    for hot in range(sum(lengths)):
        flat = torch.zeros(sum(lengths), dtype=torch.float64)
        flat[hot] = 1
        parts = iter(flat.split(lengths))
        total += sample(functools.partial(_next, parts))
    return total


def _next(parts: Iterator[Tensor], like: Tensor) -> Tensor:
    return next(parts).view(like.shape).to(like.dtype)


def probes_of(program: Program, matrix: Matrix, outputs: bool, loss: Any) -> TraceProbes:
    layout = UnitLayout.of(program, find_groups(program))
    weights = Weights.of(program, list(layout.labels))
    return TraceProbes(program, layout, weights, Objective(loss), matrix, outputs)


@pytest.mark.parametrize(
    ("activation", "matrix", "outputs"),
    [
        (nn.Tanh, "hessian", False),
        (nn.LeakyReLU, "hessian", False),
        (nn.LeakyReLU, "hessian", True),
        (nn.Tanh, "gauss-newton", False),
        (nn.Tanh, "gauss-newton", True),
    ],
)
def test_traces_equal_the_full_matrix(
    activation: Callable[[], nn.Module], matrix: Any, outputs: bool
) -> None:
    program, (x, y) = build(activation), samples()
    probes = probes_of(program, matrix, outputs, F.cross_entropy)
    names = list(probes.layout.labels)
    batch = Batch((x,), y)
    full = full_matrix(program, names, batch, F.cross_entropy, matrix)
    expected = unit_traces(probes.layout, names, program, full)
    assert len(expected) == 7
    torch.testing.assert_close(basis(probes, batch), expected, rtol=1e-8, atol=1e-10)


def test_traces_of_a_squared_error_equal_the_full_matrix() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    batch = Batch((x,), torch.randn(SIZE, 3, dtype=torch.float64))
    probes = probes_of(program, "hessian", True, F.mse_loss)
    names = list(probes.layout.labels)
    full = full_matrix(program, names, batch, F.mse_loss, "hessian")
    expected = unit_traces(probes.layout, names, program, full)
    torch.testing.assert_close(basis(probes, batch), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_traces_without_probes_equal_the_full_hessian(loss: Any) -> None:
    program, (x, y) = build(nn.LeakyReLU), samples()
    target = y if loss is F.cross_entropy else torch.randn(SIZE, 3, dtype=torch.float64)
    settings = SensitivitySettings("hessian-trace", samples=SIZE, batch_size=2)
    found, layout, _ = measure(program, find_groups(program), settings, context(x, target, loss))
    assert found.details["method"] == "exact"
    names = list(layout.labels)
    full = full_matrix(program, names, Batch((x,), target), loss, "hessian")
    squares = {name: program.tensor(name).detach().square() for name in names}
    factor = layout.sums(squares) / layout.counts(program) / 2
    expected = unit_traces(layout, names, program, full) * factor
    torch.testing.assert_close(layout.joined(found.scores), expected, rtol=1e-8, atol=1e-10)


def test_traces_of_dense_prediction_skip_ignored_positions() -> None:
    torch.manual_seed(0)
    program = trace(Dense().double(), (torch.randn(2, 2, 4, 4, dtype=torch.float64),))
    target = torch.randint(3, (3, 4, 4))
    target[0, 1] = -100
    batch = Batch((torch.randn(3, 2, 4, 4, dtype=torch.float64),), target)
    probes = probes_of(program, "hessian", True, F.cross_entropy)
    names = list(probes.layout.labels)
    full = full_matrix(program, names, batch, F.cross_entropy, "hessian")
    expected = unit_traces(probes.layout, names, program, full)
    torch.testing.assert_close(basis(probes, batch), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ["weights", "outputs"])
def test_estimates_agree_with_the_full_hessian_within_their_errors(estimator: Any) -> None:
    program, (x, y) = build(nn.LeakyReLU), samples()
    settings = SensitivitySettings(
        "hessian-trace", samples=SIZE, batch_size=SIZE, estimator=estimator, probes=400, tolerance=0
    )
    found, layout, _ = measure(program, find_groups(program), settings, context(x, y))
    names = list(layout.labels)
    full = full_matrix(program, names, Batch((x,), y), F.cross_entropy, "hessian")
    squares = {name: program.tensor(name).detach().square() for name in names}
    factor = layout.sums(squares) / layout.counts(program) / 2
    expected = unit_traces(layout, names, program, full) * factor
    deviation = (layout.joined(found.scores) - expected) / layout.joined(found.errors)
    assert deviation.abs().max() < 4.5
    assert 0.2 < deviation.square().mean() < 3
    assert found.details["probes"] == 400


def test_batches_have_the_mean_trace_of_all_samples() -> None:
    program, (x, y) = build(nn.LeakyReLU), samples()
    found = [
        measure(
            program,
            find_groups(program),
            SensitivitySettings(
                "hessian-trace", samples=5, batch_size=size, estimator="outputs", probes=150,
                tolerance=0,
            ),
            context(x, y),
        )
        for size in (2, 5)
    ]  # fmt: skip
    layout = found[0][1]
    one, other = (layout.joined(sensitivity.scores) for sensitivity, _, _ in found)
    error = sum(layout.joined(s.errors).square() for s, _, _ in found)
    assert isinstance(error, Tensor)
    assert ((one - other).abs() / error.sqrt()).max() < 4.5


def test_hessian_vector_products_equal_finite_differences() -> None:
    program, (x, y) = build(nn.Tanh), samples()
    probes = probes_of(program, "hessian", False, F.cross_entropy)
    leaves = probes.weights.leaves
    torch.manual_seed(3)
    signs = {name: torch.randint(2, leaf.shape) * 2.0 - 1 for name, leaf in leaves.items()}
    order = iter(signs.values())
    found = probes.prepare(Batch((x,), y), torch.Generator())(
        lambda like: next(order).to(like.dtype)
    )

    def slope(step: float) -> dict[str, Tensor]:
        moved = {n: (v + step * signs[n]).detach().requires_grad_() for n, v in leaves.items()}
        loss = F.cross_entropy(functional_call(program.graph_module, moved, (x,)), y)
        return dict(zip(moved, torch.autograd.grad(loss, list(moved.values())), strict=True))

    step = 1e-5
    ahead, behind = slope(step), slope(-step)
    product = {n: signs[n] * (ahead[n] - behind[n]) / (2 * step) for n in leaves}
    torch.testing.assert_close(found, probes.layout.sums(product), rtol=1e-6, atol=1e-8)


def test_only_networks_without_smooth_operators_are_piecewise_linear() -> None:
    assert piecewise_linear(build(nn.LeakyReLU))
    assert not piecewise_linear(build(nn.GELU))
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert not piecewise_linear(trace(twice, (torch.randn(2, 4),)))


def test_few_samples_share_a_probe_where_that_is_free() -> None:
    """Every sample is seen once, however the batches are cut."""
    program = build(nn.ReLU)
    x, y = samples()
    layout = UnitLayout.of(program, find_groups(program))
    task = Task(program, layout, SensitivitySettings(batch_size=4), context(x, y))
    whole, parts = list(task.batches()), list(task.batches(2))
    assert [len(batch) for batch in whole] == [4, 1]
    assert [len(batch) for batch in parts] == [2, 2, 1]
    seen = torch.cat([batch.inputs[0] for batch in parts])
    assert torch.equal(seen, torch.cat([batch.inputs[0] for batch in whole]))
