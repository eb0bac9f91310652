from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fxprune.calibration.layer_matrix import layers
from fxprune.graph.program import Program
from fxprune.reconstruction.footprint import MEMORY_MARGIN, per_sample
from fxprune.reconstruction.lookahead import Curvature, Lookahead, variables
from fxprune.reconstruction.region import Region, comparable, cut

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Tokens of an image, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x.flatten(1, 2))).mean(1)  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.GELU(), nn.Flatten(), nn.Linear(512, 4),
    )  # fmt: skip


def first_region(model: nn.Module, ahead: int) -> tuple[Program, Region]:
    program = trace(model.eval(), X[:2])
    region = cut(next(iter(layers(program))), ahead, comparable(program, program.copy()))
    assert region is not None
    return program, region


def kept(program: Program, region: Region, curvature: Curvature) -> int:
    """What a linearisation on all samples really keeps, beside the weights."""
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    frontier: Any = {place: X}
    for node in program.graph.nodes:
        if node is region.layer.node:
            break
        if node.op == "call_function":
            with torch.no_grad():
                frontier |= Region(region.layer, (node,), ()).run(program, frontier, {})
    with torch.no_grad():
        values = region.run(program, frontier, {})
        wanted = [values[node].clone() for node in region.outputs]
    names = variables(program, region)
    task = Lookahead(program, region, names, (None,) * len(names), lambda _: (frontier, wanted), {})
    seen: dict[int, int] = {}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.no_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        product = task.product(0, task.point(), curvature)
    assert product is not None
    stored = program.graph_module.state_dict().values()
    for tensor in stored:
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@pytest.mark.parametrize("curvature", ["gauss-newton", "newton"])
@pytest.mark.parametrize("model", [convolutions, Attention])
def test_is_what_a_linearisation_keeps(model: Any, curvature: Curvature) -> None:
    program, region = first_region(model(), 6)
    real = kept(program, region, curvature)
    told = per_sample(program, [region], curvature) * len(X) / MEMORY_MARGIN
    assert 0.8 * real < told < 2 * real


def test_grows_with_the_look_ahead_and_counts_the_largest() -> None:
    program, near = first_region(convolutions(), 1)
    far = cut(near.layer, 6, comparable(program, program.copy()))
    assert far is not None
    small, large = (per_sample(program, [region], "gauss-newton") for region in (near, far))
    assert 0 < small < large
    assert per_sample(program, [near, far], "gauss-newton") == large
    assert 0 < per_sample(program, [near]) < small
    assert per_sample(program, []) == 0
