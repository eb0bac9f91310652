from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.comparison import relative_error
from fxprune.onnx.export import export_onnx
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.passes import ConvertQuantized, InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.quantization.transposed import spell_transposed
from fxprune.training.evaluate import run_onnx


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"),
    [(2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 2, 0, 0), (5, 3, 2, 1), ((3, 2), 2, (1, 0), 0),
     (1, 2, 0, 0)],
)  # fmt: skip
def test_convolutions_compute_what_transposed_ones_do(
    kernel: int, stride: int, padding: int, extra: int
) -> None:
    layer = nn.ConvTranspose2d(3, 5, kernel, stride, padding, extra).double().eval()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    program = trace(layer, x)
    assert spell_transposed(program) == 1
    assert not any("transpose" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(4, 4, 3, 2, groups=2), nn.ConvTranspose2d(4, 4, 3),
     nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1)],
)  # fmt: skip
def test_others_are_left(layer: nn.Module) -> None:
    assert spell_transposed(trace(layer.eval(), torch.randn(1, 4, 5, 5))) == 0


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.merge = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        y = self.up(self.inner(nn.functional.max_pool2d(x, 2)).relu())
        return self.head(self.merge(torch.cat([x, y], 1)).relu())  # type: ignore[no-any-return]


def test_a_unet_has_no_fp32_inside(tmp_path: Path) -> None:
    x = torch.randn(24, 3, 12, 12)
    program = trace(UNet().eval(), x[:2])
    context = Context(Data(Arrays(x)), dense=program.copy())
    exact = program(x)
    for step in (InsertObservers(measure=False), TrainQuantized(samples=24), ConvertQuantized()):
        step(program, context)
    with torch.no_grad():
        expected = program(x)
    assert relative_error(exact, expected) < 0.1
    path = tmp_path / "unet.onnx"
    export_onnx(program, path)
    fusion = inspect_fusion(path)
    assert fusion.unfused == ()
    assert fusion.fused == {"QLinearConcat": 1, "QLinearConv": 5}
    assert relative_error(run_onnx(path)((x,)), expected) < 0.02
