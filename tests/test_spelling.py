from __future__ import annotations

import pytest
import torch
from support import assert_same, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.spelling import spell_attention, spell_means


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
