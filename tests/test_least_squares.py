from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fxprune.calibration.least_squares
from fxprune.calibration.least_squares import factorise, solve
from fxprune.calibration.moments import Moments
from fxprune.errors import FxpruneError

GENERATOR = torch.Generator().manual_seed(0)


def problem(groups: int = 2, features: int = 5, outputs: int = 3, n: int = 60) -> list[Tensor]:
    sizes = (groups, features, n), (groups, outputs, n)
    return [torch.randn(s, generator=GENERATOR, dtype=torch.float64) + 0.5 for s in sizes]


def moments(x: Tensor, r: Tensor, parts: int = 4) -> Moments:
    found = Moments.zeros(x.shape[0], x.shape[1], r.shape[1], x.device)
    for a, b in zip(x.tensor_split(parts, 2), r.tensor_split(parts, 2), strict=True):
        found.add(a, b)
    return found


def direct(x: Tensor, r: Tensor, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    rows = x.T.numpy()
    if bias:
        rows = np.hstack([rows, np.ones((len(rows), 1))])
    found = np.linalg.lstsq(rows, r.T.numpy())[0]
    return (found[:-1].T, found[-1]) if bias else (found.T, np.zeros(r.shape[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_least_squares_solution(bias: bool) -> None:
    x, r = problem()
    change, shift = solve(moments(x, r), 0.0, bias=bias)
    for group in range(2):
        wanted, offset = direct(x[group], r[group], bias)
        np.testing.assert_allclose(change[group], wanted, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(shift[group], offset, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_only_kept_weights_take_part(bias: bool) -> None:
    x, r = problem()
    keep = torch.rand(2, 3, 5, generator=GENERATOR) > 0.4
    change, shift = solve(moments(x, r), 0.0, bias=bias, keep=keep)
    for group in range(2):
        for output in range(3):
            kept = keep[group, output]
            wanted, offset = direct(x[group][kept], r[group][output : output + 1], bias)
            np.testing.assert_allclose(change[group, output][kept], wanted[0], rtol=1e-6)
            np.testing.assert_allclose(shift[group, output], offset[0], rtol=1e-6, atol=1e-9)
            assert not change[group, output][~kept].any()


def test_a_large_ridge_leaves_the_weights_alone() -> None:
    x, r = problem()
    change, _ = solve(moments(x, r), 1e9, bias=False)
    assert float(change.abs().max()) < 1e-6


def test_the_ridge_is_relative_to_the_features() -> None:
    x, r = problem()
    plain, _ = solve(moments(x, r), 0.1, bias=False)
    large, _ = solve(moments(1000 * x, r), 0.1, bias=False)
    np.testing.assert_allclose(1000 * large, plain, rtol=1e-9)


def test_features_that_never_vary_do_no_harm() -> None:
    x, r = problem()
    x[:, 2] = 0
    change, shift = solve(moments(x, r), 1e-6, bias=True)
    assert bool(change.isfinite().all())
    assert bool(shift.isfinite().all())
    assert float(change[:, :, 2].abs().max()) < 1e-9


def test_loss_and_best_step_against_the_residuals() -> None:
    x, r = problem()
    change = torch.randn(2, 3, 5, generator=GENERATOR, dtype=torch.float64)
    shift = torch.randn(2, 3, generator=GENERATOR, dtype=torch.float64)
    seen = moments(x, r)

    def loss(size: Tensor) -> Tensor:
        made = (size.unsqueeze(2) * change) @ x + (size * shift).unsqueeze(2)
        return (r - made).square().sum(2)

    torch.testing.assert_close(seen.loss(change, shift), loss(torch.ones(2, 3)))
    size = seen.best_step(change, shift)
    for step in (-0.01, 0.01):
        moved = (size + step).clamp(0, 1)
        assert bool((loss(moved) >= loss(size) - 1e-9).all())


@pytest.mark.parametrize("bias", [True, False])
def test_large_masked_systems_are_solved_stepwise(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, r = problem(features=24, outputs=6, n=200)
    x = x.cumsum(1)  # far from independent
    keep = torch.rand(2, 6, 24, generator=GENERATOR) > 0.5
    keep[0, 0] = False
    found = [solve(moments(x, r), 1e-3, bias=bias, keep=keep)]
    monkeypatch.setattr(fxprune.calibration.least_squares, "MAX_DIRECT_PRODUCTS", 0)
    found.append(solve(moments(x, r), 1e-3, bias=bias, keep=keep))
    assert not found[1][0][~keep].any()
    for exact, near in zip(*found, strict=True):
        torch.testing.assert_close(near, exact, rtol=0, atol=1e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_single_precision_tells_small_variation_about_a_large_mean(mean: float) -> None:
    x, _ = problem(features=6, n=5000)
    x = 0.01 * x + mean
    weight = torch.randn(2, 3, 6, generator=GENERATOR, dtype=torch.float64)
    x = x.float().double()  # what both are told
    r = weight @ x
    change, _ = solve(moments(x.float(), r.float()), 0.0, bias=True)
    torch.testing.assert_close(change, weight, rtol=0, atol=2e-2)


def test_singular_systems_are_damped_until_they_can_be_solved() -> None:
    x, _ = problem(features=4)
    gram = x @ x.mT
    gram[1] = gram[1, :1].T @ gram[1, :1] - 1e-9 * torch.eye(4)  # rank one, and rounded downwards
    factors = factorise(gram)
    torch.testing.assert_close(factors @ factors.mT, gram, rtol=1e-6, atol=1e-6)
    assert torch.equal(factors[0], torch.linalg.cholesky(gram[0]))


@pytest.mark.parametrize(("value", "what"), [(float("inf"), "finite"), (1e9, "definite")])
def test_systems_that_no_damping_mends_are_an_error(value: float, what: str) -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 0, 1] = gram[0, 1, 0] = value
    with pytest.raises(FxpruneError, match=f"not {what}"):
        factorise(gram)
