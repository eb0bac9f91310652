from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import assert_same, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.graph.decompose import spell_attention, spell_clamps, spell_means
from fxprune.onnx.export import export_onnx


class Mean(nn.Module):
    def __init__(self, dims: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self.dims, self.keep = dims, keep

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).mean(self.dims, keepdim=self.keep)


@pytest.mark.parametrize(
    ("dims", "keep", "spelled"),
    [((2, 3), False, 1), ((-1, -2), True, 1), ((1,), False, 0), ((1, 2, 3), False, 0)],
)
def test_means_over_places_become_pooling(dims: tuple[int, ...], keep: bool, spelled: int) -> None:
    x = torch.randn(2, 3, 5, 4)
    program = trace(Mean(dims, keep), x)
    assert spell_means(program) == spelled
    program.refresh()
    assert_same(program(x), F.relu(x).mean(dims, keepdim=keep))
    names = {str(node.target) for node in program.graph.nodes}
    assert ("aten.mean.dim" in names) is not bool(spelled)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.flip(-1), x + 1, is_causal=True)


def test_attention_becomes_products() -> None:
    x = torch.randn(2, 3, 5, 4)
    program = trace(Attend(), x)
    assert spell_attention(program) == 1
    program.refresh()
    assert_same(program(x), Attend()(x))
    assert sum("matmul" in str(node.target) for node in program.graph.nodes) == 2


class Clamped(nn.Module):
    """Two layers read one value, each within bounds that are stored."""

    low: Tensor
    high: Tensor
    none: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)
        self.register_buffer("low", torch.tensor(-1.0))
        self.register_buffer("high", torch.tensor(1.5))
        self.register_buffer("none", torch.tensor(float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = self.one(torch.clamp(y, self.low, self.high))
        second = self.two(torch.clamp(y, -self.none, self.none))
        result: Tensor = first + second * torch.clamp(first, self.low)
        return result


def test_clamps_by_stored_bounds_survive_the_export(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    program = trace(Clamped(), x)
    expected = program(x)
    check = export_onnx(program, tmp_path / "model.onnx")
    assert check.parity is not None
    assert check.parity <= 1e-6
    assert spell_clamps(program) == 2  # the bound of the third is computed
    program.refresh()
    assert_same(program(x), expected)
