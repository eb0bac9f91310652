from __future__ import annotations

from typing import Any

import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn

import fxprune.reconstruction.precondition
from fxprune.calibration.layer_matrix import layers
from fxprune.graph.program import Program
from fxprune.reconstruction.lookahead import Lookahead, variables
from fxprune.reconstruction.newton import Vector, conjugate_gradients
from fxprune.reconstruction.precondition import preconditioner
from fxprune.reconstruction.region import Region, comparable, cut

X = torch.randn(32, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NETS = {
    "bias": nn.Conv2d(4, 4, 3, groups=2),
    "none": nn.Conv2d(4, 4, 3, bias=False),
    "norm": nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)),
}


def parts(name: str) -> tuple[Program, Region, tuple[str, ...], Any]:
    """A layer whose last output is affine in its variables, on correlated inputs."""
    program = trace(randomise_norms(NETS[name]).double().eval(), X[:2])
    (layer,) = layers(program)
    region = cut(layer, 0, comparable(program, program.copy()))
    assert region is not None
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    values = {place: X.cumsum(1) + 1}
    return program, region, variables(program, region), values


def steps(name: str, keep: Tensor | None, tolerance: float) -> int:
    program, region, names, values = parts(name)
    wanted = [torch.randn_like(region.run(program, values, {})[node]) for node in region.outputs]
    masks = tuple(keep if number == 0 else None for number in range(len(names)))
    task = Lookahead(program, region, names, masks, lambda n: (values, wanted), {})
    precondition = preconditioner(program, region.layer, names, keep, values)
    point = task.point()
    return conjugate_gradients(
        task.product(0, point, "gauss-newton"), task.gradient([0], point), damping=0.0,
        tolerance=tolerance, max_steps=30, precondition=precondition,
    ).steps  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_least_squares_needs_one_step(name: str, masked: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(fxprune.reconstruction.precondition, "RELATIVE_RIDGE", 1e-12)
    shape = next(iter(NETS[name].parameters())).shape
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5 if masked else None
    assert steps(name, keep, 1e-3) == 1


@torch.no_grad()
def test_large_systems_fall_back_to_their_diagonals(monkeypatch: Any) -> None:
    monkeypatch.setattr(fxprune.reconstruction.precondition, "MAX_SYSTEM_ELEMENTS", 1)
    program, region, names, values = parts("bias")
    keep = torch.rand(program.tensor("weight").shape) > 0.5
    multiply = preconditioner(program, region.layer, names, keep, values)
    assert multiply is not None
    vector: Vector = tuple(torch.randn_like(program.tensor(name)) for name in names)
    found = multiply(vector)
    assert not found[0][~keep].any()
    assert bool((found[0][keep] * vector[0][keep] > 0).all())


def test_shared_and_transposed_layers_have_none() -> None:
    program = trace(nn.ConvTranspose2d(4, 4, 1).double(), X[:2])
    (layer,) = layers(program)
    assert preconditioner(program, layer, ("weight",), None, {}) is None
