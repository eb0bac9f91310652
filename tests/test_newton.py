from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.reconstruction.newton import Vector, conjugate_gradients, line_search

GENERATOR = torch.Generator().manual_seed(0)
G = tuple(torch.randn(n, generator=GENERATOR, dtype=torch.float64) for n in (4, 3))


def matrix(low: float = 0.1) -> Tensor:
    basis = torch.linalg.qr(torch.randn(7, 7, generator=GENERATOR, dtype=torch.float64))[0]
    found: Tensor = basis @ torch.diag(torch.linspace(low, 5, 7, dtype=torch.float64)) @ basis.T
    return found


def times(h: Tensor, vector: Vector) -> Vector:
    found = h @ torch.cat(vector)
    return found[:4], found[4:]


def test_solves_the_system() -> None:
    h = matrix()
    found = conjugate_gradients(
        lambda v: times(h, v), G, damping=0.0, tolerance=1e-10, max_steps=20
    )
    torch.testing.assert_close(torch.cat(found.vector), -torch.linalg.solve(h, torch.cat(G)))
    assert found.steps <= 8


def test_damping_is_relative_to_the_curvature_along_the_gradient() -> None:
    h, g = matrix(), torch.cat(G)
    found = conjugate_gradients(
        lambda v: times(h, v), G, damping=0.5, tolerance=1e-10, max_steps=20
    )
    shifted = h + 0.5 * (g @ h @ g) / (g @ g) * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(torch.cat(found.vector), -torch.linalg.solve(shifted, g))


def test_a_good_preconditioner_needs_one_step() -> None:
    h = matrix()
    found = conjugate_gradients(
        lambda v: times(h, v), G, damping=0.0, tolerance=1e-8, max_steps=20,
        precondition=lambda v: times(torch.linalg.inv(h), v),
    )  # fmt: skip
    assert found.steps == 1


@pytest.mark.parametrize("most", [1, 2, 20])
def test_stays_a_descent_direction_where_the_curvature_is_negative(most: int) -> None:
    h = matrix(-5.0)
    found = conjugate_gradients(
        lambda v: times(h, v), G, damping=0.0, tolerance=0.0, max_steps=most
    )
    assert float(torch.cat(found.vector) @ torch.cat(G)) < 0


def test_without_a_gradient_there_is_nowhere_to_go() -> None:
    zero = tuple(torch.zeros_like(part) for part in G)
    found = conjugate_gradients(lambda v: v, zero, damping=0.0, tolerance=0.1, max_steps=5)
    assert found.steps == 0


def test_the_search_goes_back_until_the_loss_falls() -> None:
    here = (torch.tensor([1.0]),)
    found = line_search(lambda p: float(p[0] ** 2), here, 1.0, (torch.tensor([-6.0]),), -12.0)
    assert found is not None
    assert float(found[0][0]) == pytest.approx(-0.5)
    assert line_search(lambda p: float(p[0] ** 2), here, 1.0, (torch.tensor([1.0]),), 2.0) is None
