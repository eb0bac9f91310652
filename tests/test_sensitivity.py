"""Scores against their definitions, removal, and symmetry."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sensitivity_nets import SIZE, Small, build, context, samples
from support import randomise_norms
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import find_groups, remove_units, trace
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import FxpruneError, InputError
from fxprune.pipeline.context import Context
from fxprune.sensitivity.gates import GatedProgram
from fxprune.sensitivity.scores import SensitivitySettings, measure


def measured(criterion: Any, **options: Any) -> tuple[Tensor, Tensor]:
    program, (x, y) = build(nn.LeakyReLU), samples()
    settings = SensitivitySettings(criterion, samples=SIZE, batch_size=SIZE, **options)
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
    settings = SensitivitySettings(criterion, samples=SIZE, batch_size=SIZE, probes=8, tolerance=0)
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
                program,
                groups,
                SensitivitySettings("random"),
                Context(data=Data(Arrays(x, y)), seed=seed),
            )[0].scores.values()
        )
    )
    torch.testing.assert_close(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_predictions_serve_as_labels() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    predicted = program(x).argmax(1)
    groups = find_groups(program)
    settings = SensitivitySettings("fisher", samples=SIZE)
    without, layout, _ = measure(program, groups, settings, context(x, None))
    given, _, _ = measure(program, groups, settings, context(x, predicted))
    torch.testing.assert_close(layout.joined(without.scores), layout.joined(given.scores))


def test_sampled_labels_estimate_the_gauss_newton_form() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()
    many = x.repeat(2000, 1, 1, 1)
    groups = find_groups(program)
    settings = SensitivitySettings("fisher", labels="sampled", samples=len(many), batch_size=5000)
    sampled, layout, _ = measure(program, groups, settings, context(many, None))
    exact, _, _ = measure(program, groups, SensitivitySettings("gauss-newton"), context(x, None))
    torch.testing.assert_close(
        layout.joined(sampled.scores), layout.joined(exact.scores), rtol=0.06, atol=1e-6
    )


def test_a_loss_of_the_users_own_needs_labels() -> None:
    program, (x, _) = build(nn.LeakyReLU), samples()

    def huber(outputs: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(outputs, target)

    groups, settings = (
        find_groups(program),
        SensitivitySettings("hessian-trace", samples=SIZE, probes=2),
    )
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
    full, half = (
        measure(
            program, groups,
            SensitivitySettings(
                "hessian-trace", samples=SIZE, estimator=estimator, precision=precision,
                probes=16, tolerance=0,
            ),
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
    settings = SensitivitySettings("hessian-trace", samples=SIZE, estimator="outputs", probes=4)
    with pytest.raises(FxpruneError, match="none of 4 probes was finite"):
        measure(program, find_groups(program), settings, context(x.float(), y))


def test_unknown_options_are_named() -> None:
    with pytest.raises(InputError, match="criterion is 'hessian'; it must be one of hessian-trace"):
        SensitivitySettings("hessian")  # type: ignore[arg-type]


@torch.library.custom_op("fxprune_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Twice a tensor, without any derivative."""
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Doubled(nn.Module):
    """Two layers before an operator without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.last(self.first(x).relu()))  # type: ignore[no-any-return]


def test_an_operator_without_a_derivative_is_worked_around_and_named() -> None:
    x = torch.randn(16, 6)
    program = trace(Doubled().eval(), (x[:2],))
    groups, there = find_groups(program), Context(Data(Arrays(x)))
    found, layout, _ = measure(program, groups, SensitivitySettings("output-shift"), there)
    expected, _, _ = measure(program, groups, SensitivitySettings("activation"), there)
    assert "no derivative" in str(found.details["note"])
    assert "doubled" in str(found.details["note"])
    assert torch.equal(layout.joined(found.scores), layout.joined(expected.scores))
