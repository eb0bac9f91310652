from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn

from fxprune.calibration.layer_matrix import layers
from fxprune.graph.program import Program
from fxprune.reconstruction.refit import Refit
from fxprune.reconstruction.region import comparable, cut

X = torch.randn(80, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def given(model: nn.Module) -> tuple[Program, Refit]:
    program = trace(randomise_norms(model).double().eval(), X[:2])
    (layer,) = layers(program)
    region = cut(layer, 0, comparable(program, program.copy()))
    assert region is not None
    return program, Refit(program, region)


def frontier(program: Program, x: Tensor) -> Any:
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    return {place: x}


def fitted(program: Program, task: Refit, wanted: Tensor, halves: int = 2) -> None:
    """Count all samples in two batches; the second is held out if there are two parts."""
    batches = zip(X.tensor_split(2), wanted.tensor_split(2), strict=True)
    for number, (x, y) in enumerate(batches):
        task.add(frontier(program, x), [y], held_out=halves > 1 and number == 1)


@torch.no_grad()
def test_bias_and_weight_are_those_of_lstsq() -> None:
    program, task = given(nn.Conv2d(3, 2, 1))
    wanted = torch.randn(80, 2, 4, 4, dtype=torch.float64)
    fitted(program, task, wanted, halves=1)
    found = task.apply(0.0)
    rows = np.hstack([X.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), np.ones((80 * 16, 1))])
    target = wanted.permute(0, 2, 3, 1).reshape(-1, 2).numpy()
    expected, residual, *_ = np.linalg.lstsq(rows, target)
    np.testing.assert_allclose(program.tensor("weight").flatten(1), expected[:3].T, rtol=1e-8)
    np.testing.assert_allclose(program.tensor("bias"), expected[3], rtol=1e-8)
    assert found is not None
    assert found.after == pytest.approx(residual.sum() / wanted.numel(), rel=1e-8)
    assert found.after < found.before


@torch.no_grad()
def test_a_norm_takes_up_the_shift_of_a_layer_without_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
    program, task = given(model)
    changed = {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}
    offset = torch.tensor([0.7, -0.4], dtype=torch.float64)
    wanted = program(X) + offset.view(1, 2, 1, 1)
    fitted(program, task, wanted)
    assert set(task.stored()) == {"0.weight", "1.running_mean"}
    assert task.apply(0.0) is not None
    torch.testing.assert_close(program(X), wanted)
    after = program.graph_module.state_dict()
    moved = {name for name, tensor in after.items() if not torch.allclose(tensor, changed[name])}
    assert moved == {"1.running_mean"}


class Parts(nn.Module):
    """Two layers side by side before one norm, as implants leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.one(x), self.two(x)], 1)) + x[:, :1]  # type: ignore[no-any-return]


@torch.no_grad()
def test_layers_before_a_concat_are_fitted_on_their_own_channels() -> None:
    program = trace(randomise_norms(Parts()).double().eval(), X[:2])
    dense = program.copy()
    stored = dense.graph_module.state_dict()
    for name in ("one.weight", "two.weight", "two.bias", "norm.running_mean"):
        stored[name].add_(torch.randn_like(stored[name]))
    dense.graph_module.load_state_dict(stored)
    stored["norm.running_mean"][2:] = program.tensor("norm.running_mean")[2:]
    dense.graph_module.load_state_dict(stored)
    wanted = dense(X)
    for layer in layers(program):
        region = cut(layer, 0, comparable(program, dense))
        assert region is not None
        assert region.outputs[-1].name == "add"
        task = Refit(program, region)
        fitted(program, task, wanted)
        found = task.apply(0.0)
        assert found is not None
        assert found.after < 1e-12 < found.before
    torch.testing.assert_close(program(X), wanted)
    mended = program.graph_module.state_dict()
    for name, value in stored.items():
        torch.testing.assert_close(mended[name], value)


@torch.no_grad()
def test_what_samples_held_out_do_not_confirm_is_not_done() -> None:
    program, task = given(nn.Conv2d(3, 2, 1))
    before = program(X)
    wanted = before + X[:, :2]  # asked of the first half alone; of the second, the opposite
    wanted[40:] = before[40:] - X[40:, :2]
    weight = program.tensor("weight").clone()
    fitted(program, task, wanted)
    found = task.apply(0.0)
    assert found is not None
    assert found.after <= found.before
    torch.testing.assert_close(program.tensor("weight"), weight, rtol=0, atol=0.05)


@torch.no_grad()
def test_there_may_be_nothing_to_mend() -> None:
    program, task = given(nn.Conv2d(3, 2, 1))
    fitted(program, task, program(X))
    assert task.apply(1e-3) is None
    assert task.error(frontier(program, X), [program(X)]) == 0
    assert task.error(frontier(program, X), [program(X) + 1]) == pytest.approx(80 * 2 * 16)
