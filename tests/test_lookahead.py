from __future__ import annotations

from typing import Any

import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn

from fxprune.calibration.layer_matrix import layers
from fxprune.graph.program import Program
from fxprune.reconstruction.lookahead import Curvature, Lookahead, variables
from fxprune.reconstruction.newton import Vector, dot
from fxprune.reconstruction.region import comparable, cut

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEP = 1e-5


def task(ahead: int = 6) -> Lookahead:
    """A look ahead from a convolution past smooth operations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(),
        nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    program = trace(randomise_norms(model).double().eval(), X[:2])
    first = next(iter(layers(program)))
    region = cut(first, ahead, comparable(program, program.copy()))
    assert region is not None
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    frontier: Any = {place: X}
    wanted = [torch.randn_like(region.run(program, frontier, {})[node]) for node in region.outputs]
    names = variables(program, region)
    return Lookahead(program, region, names, (None,) * len(names), lambda n: (frontier, wanted), {})


def random(like: Vector) -> Vector:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in like)


def moved(point: Vector, step: float, along: Vector) -> Vector:
    return tuple(part + step * other for part, other in zip(point, along, strict=True))


def test_a_norm_shifts_the_outputs_of_a_layer_without_bias() -> None:
    assert task().names == ("0.weight", "1.bias")


@torch.no_grad()
def test_the_gradient_is_that_of_the_loss() -> None:
    found = task()
    point = found.point()
    along = random(point)
    up, down = (found.loss([0], moved(point, sign * STEP, along)) for sign in (1, -1))
    slope = dot(found.gradient([0], point), along)
    assert slope == pytest.approx((up - down) / (2 * STEP), rel=1e-6)


@torch.no_grad()
def test_newton_multiplies_by_the_second_derivative() -> None:
    found = task()
    point = found.point()
    along = random(point)
    up, down = (found.gradient([0], moved(point, sign * STEP, along)) for sign in (1, -1))
    product = found.product(0, point, "newton")(along)
    for part, a, b in zip(product, up, down, strict=True):
        torch.testing.assert_close(part, (a - b) / (2 * STEP), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_gauss_newton_multiplies_by_the_square_of_the_slopes() -> None:
    found = task()
    point = found.point()
    along = random(point)
    residuals = found.residuals(found.batch(0))
    up, down = (residuals(*moved(point, sign * STEP, along)) for sign in (1, -1))
    image = [(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)]
    product = found.product(0, point, "gauss-newton")(along)
    expected = 2 * sum(float(part.square().sum()) for part in image)
    assert dot(product, along) == pytest.approx(expected, rel=1e-6)
    other = random(product)
    symmetric = dot(found.product(0, point, "gauss-newton")(other), along)
    assert dot(product, other) == pytest.approx(symmetric, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("curvature", ["newton", "gauss-newton"])
def test_masked_weights_do_not_take_part(curvature: Curvature) -> None:
    whole = task()
    keep = torch.rand(whole.point()[0].shape) > 0.5
    found = Lookahead(whole.program, whole.region, whole.names, (keep, None), whole.batch, {})
    point = found.point()
    assert not found.gradient([0], point)[0][~keep].any()
    assert not found.product(0, point, curvature)(random(point))[0][~keep].any()


@torch.no_grad()
def test_tied_weights_change_under_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(4, 3)
    program: Program = trace(model, x)
    (layer,) = layers(program)
    region = cut(layer, 5, comparable(program, program.copy()))
    assert region is not None
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    frontier: Any = {place: x}
    wanted: list[Tensor] = [region.run(program, frontier, {})[node] for node in region.outputs]
    found = Lookahead(program, region, (layer.weight,), (None,), lambda n: (frontier, wanted), {})
    assert found.loss([0], found.point()) == 0
    weight = 2 * found.point()[0]
    given = dict.fromkeys(("0.weight", "2.weight"), weight)
    other = [region.run(program, frontier, given)[node] for node in region.outputs]
    target = Lookahead(program, region, (layer.weight,), (None,), lambda n: (frontier, other), {})
    assert target.loss([0], (weight,)) == 0
