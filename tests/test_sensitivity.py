"""Scores against full Hessians, finite differences, brute force and symmetry."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from support import randomise_norms
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from fxprune import find_groups, remove_units, trace
from fxprune.context import Context
from fxprune.data import Batch, Data
from fxprune.datasets import Arrays
from fxprune.errors import FxpruneError, InputError
from fxprune.program import Program
from fxprune.sensitivity import Settings, measure
from fxprune.sensitivity_gates import GatedProgram
from fxprune.sensitivity_model import Objective, Weights
from fxprune.sensitivity_probes import Matrix, TraceProbes, piecewise_linear
from fxprune.sensitivity_tally import StoppingRule
from fxprune.sensitivity_units import UnitLayout

SIZE = 5  # samples


class Small(nn.Module):
    """Two convolutions with a residual sum, so that units span several tensors."""

    def __init__(self, activation: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.outer = nn.Conv2d(3, 4, 1)
        self.activation = activation
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = x + self.outer(self.activation(self.norm(self.inner(x))))
        made: Tensor = self.head(self.activation(x).mean((2, 3)))
        return made


class Dense(nn.Module):
    """Logits for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).relu())
        return made


def build(kind: Callable[[], nn.Module]) -> Program:
    return _build(kind)


@functools.cache
def _build(kind: Hashable) -> Program:
    torch.manual_seed(0)
    activation = nn.LeakyReLU(0.3) if kind is nn.LeakyReLU else kind()  # type: ignore[operator]
    model = randomise_norms(Small(activation)).double()
    return trace(model, (torch.randn(2, 2, 5, 5, dtype=torch.float64),))


def samples(seed: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(classes, (SIZE,), generator=generator)


def context(x: Tensor, y: Tensor | None, loss: Any = F.cross_entropy) -> Context:
    return Context(data=Data(Arrays(x, y)), loss=loss)


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
    settings = Settings(samples=SIZE, batch_size=2)
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
    rule = StoppingRule(cap=400, tolerance=0)
    settings = Settings(samples=SIZE, batch_size=SIZE, estimator=estimator, rule=rule)
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
    rule = StoppingRule(cap=150, tolerance=0)
    found = [
        measure(
            program,
            find_groups(program),
            Settings(samples=5, batch_size=size, estimator="outputs", rule=rule),
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


def measured(criterion: Any, **options: Any) -> tuple[Tensor, Tensor]:
    program, (x, y) = build(nn.LeakyReLU), samples()
    settings = Settings(criterion, samples=SIZE, batch_size=SIZE, **options)
    found, layout, _ = measure(program, find_groups(program), settings, context(x, y))
    gated = GatedProgram.of(program, layout.groups)
    values = torch.ones(SIZE, gated.units, dtype=torch.float64, requires_grad=True)
    outputs = gated.run((x,), values)
    rows = [
        torch.autograd.grad(outputs[:, c].sum(), values, retain_graph=True)[0] for c in range(3)
    ]
    return layout.joined(found.scores), torch.stack(rows, -1)


def test_gates_at_zero_are_removal() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    groups = [group for group in find_groups(program) if group.frozen_because is None]
    gated = GatedProgram.of(program, groups)
    torch.testing.assert_close(gated.run((x,), torch.ones(1, gated.units).double()), program(x))
    starts = itertools.accumulate((len(group.units) for group in groups), initial=0)
    for group, start in zip(groups, starts, strict=False):
        values = torch.ones(1, gated.units).double()
        values[0, start + 1] = 0
        smaller = program.copy()
        remove_units(smaller, {group: [1]})
        torch.testing.assert_close(gated.run((x,), values), smaller(x))


def test_gauss_newton_over_all_outputs_is_exact() -> None:
    scores, slopes = measured("gauss-newton")
    x, _ = samples()
    share = build(nn.LeakyReLU)(x).softmax(1)[:, None]
    form = (share * slopes**2).sum(-1) - (share * slopes).sum(-1) ** 2
    torch.testing.assert_close(scores, form.mean(0) / 2)


def test_output_shift_is_the_mean_square_of_the_jacobian() -> None:
    scores, slopes = measured("output-shift")
    torch.testing.assert_close(scores, slopes.square().mean((0, 2)))
    drawn, _ = measured("output-shift", output_probes=2)
    assert not torch.equal(drawn, scores)
    torch.testing.assert_close(drawn, scores, rtol=1, atol=1e-3)


def test_fisher_and_taylor_are_over_single_samples() -> None:
    fisher, slopes = measured("fisher")
    taylor, _ = measured("taylor")
    x, y = samples()
    residual = build(nn.LeakyReLU)(x).softmax(1) - F.one_hot(y, 3)
    single = (residual[:, None] * slopes).sum(-1)
    torch.testing.assert_close(fisher, single.square().mean(0) / 2)
    torch.testing.assert_close(taylor, single.abs().mean(0))


CRITERIA = [
    "hessian-trace", "gauss-newton-trace", "gauss-newton", "output-shift", "fisher",
    "taylor", "magnitude-l1", "magnitude-l2", "bn-scale", "activation",
]  # fmt: skip


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.norm(self.first(x)).relu()).mean((2, 3))
        return made


def reordered(model: Pair, order: Tensor) -> Pair:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (moved.first.weight, moved.first.bias, moved.norm.weight, moved.norm.bias,
                       moved.norm.running_mean, moved.norm.running_var):  # fmt: skip
            assert tensor is not None
            tensor.copy_(tensor[order])
        moved.second.weight.copy_(moved.second.weight[:, order])
    return moved


def pair_scores(model: Pair, criterion: Any) -> Tensor:
    x, y = samples()
    program = trace(model, (x[:2],))
    rule = StoppingRule(cap=8, tolerance=0)
    settings = Settings(criterion, samples=SIZE, batch_size=SIZE, rule=rule)
    found, layout, _ = measure(program, find_groups(program), settings, context(x, y))
    return layout.joined(found.scores)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_follow_a_reordering_of_units(criterion: str) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Pair().double())
    assert isinstance(model, Pair)
    order = torch.tensor([2, 0, 3, 1])
    scores = pair_scores(model, criterion)
    torch.testing.assert_close(pair_scores(reordered(model, order), criterion), scores[order])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equal_units_tie(criterion: str) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Pair().double())
    assert isinstance(model, Pair)
    scores = pair_scores(reordered(model, torch.tensor([0, 1, 2, 1])), criterion)
    torch.testing.assert_close(scores[1], scores[3])
    assert len(scores.unique()) >= 3


def test_random_scores_depend_on_the_seed_alone() -> None:
    program, (x, y) = build(nn.LeakyReLU), samples()
    groups = find_groups(program)
    draw: Callable[[int], Tensor] = lambda seed: torch.cat(  # noqa: E731
        list(
            measure(
                program, groups, Settings("random"), Context(data=Data(Arrays(x, y)), seed=seed)
            )[0].scores.values()
        )
    )
    torch.testing.assert_close(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_predictions_serve_as_labels() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    predicted = program(x).argmax(1)
    groups = find_groups(program)
    settings = Settings("fisher", samples=SIZE)
    without, layout, _ = measure(program, groups, settings, context(x, None))
    given, _, _ = measure(program, groups, settings, context(x, predicted))
    torch.testing.assert_close(layout.joined(without.scores), layout.joined(given.scores))


def test_sampled_labels_estimate_the_gauss_newton_form() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    many = x.repeat(2000, 1, 1, 1)
    groups = find_groups(program)
    settings = Settings("fisher", labels="sampled", samples=len(many), batch_size=5000)
    sampled, layout, _ = measure(program, groups, settings, context(many, None))
    exact, _, _ = measure(program, groups, Settings("gauss-newton"), context(x, None))
    torch.testing.assert_close(
        layout.joined(sampled.scores), layout.joined(exact.scores), rtol=0.06, atol=1e-6
    )


def test_a_loss_of_the_users_own_needs_labels() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()

    def huber(outputs: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(outputs, target)

    groups, settings = find_groups(program), Settings(samples=SIZE, rule=StoppingRule(cap=2))
    with pytest.raises(InputError, match="give labelled samples"):
        measure(program, groups, settings, context(x, None, huber))
    target = torch.randn(SIZE, 3, dtype=torch.float64)
    found, _, _ = measure(program, groups, settings, context(x, target, huber))
    assert found.details["method"] == "weights"


@pytest.mark.parametrize("estimator", ["weights", "outputs", "exact"])
def test_half_precision_ranks_alike(estimator: Any) -> None:
    torch.manual_seed(0)
    program = trace(randomise_norms(Small(nn.LeakyReLU(0.3))), (torch.randn(2, 2, 5, 5),))
    x, y = samples()
    groups = find_groups(program)
    rule = StoppingRule(cap=16, tolerance=0)
    full, half = (
        measure(
            program, groups,
            Settings(samples=SIZE, estimator=estimator, precision=precision, rule=rule),
            context(x.float(), y),
        )
        for precision in ("fp32", "bf16")
    )  # fmt: skip
    a, b = full[1].joined(full[0].scores), half[1].joined(half[0].scores)
    assert torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1] > 0.95


def test_probes_that_are_not_finite_are_dropped_and_all_lost_is_an_error() -> None:
    torch.manual_seed(0)
    model = Small(nn.LeakyReLU(0.3))
    program = trace(model, (torch.randn(2, 2, 5, 5),))
    x, y = samples()
    x[0] = torch.inf
    settings = Settings(samples=SIZE, estimator="outputs", rule=StoppingRule(cap=4))
    with pytest.raises(FxpruneError, match="none of 4 probes was finite"):
        measure(program, find_groups(program), settings, context(x.float(), y))


def test_unknown_options_are_named() -> None:
    with pytest.raises(InputError, match="criterion is 'hessian'; it may be hessian-trace"):
        Settings("hessian")  # type: ignore[arg-type]
