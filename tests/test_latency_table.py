from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support import trace
from torch import Tensor, nn

from fxprune.graph.program import Program, shape_of
from fxprune.latency.cache import Host, Timing
from fxprune.latency.layer_config import FORMS, Form, LayerConfig, conversion
from fxprune.latency.layers import layers, others
from fxprune.latency.table import Table, key_of
from fxprune.latency.terms import config_of
from fxprune.latency.timed_model import Entry, model_of
from fxprune.onnx.benchmark import open_session, random_inputs
from fxprune.onnx.quantized_nodes import inspect_fusion


def configs_of(program: Program, batch: int = 1) -> list[LayerConfig]:
    """The layers of a program with their sizes."""
    return [
        LayerConfig(layer.kind, layer.geometry, tuple(
            dim if isinstance(dim, int) else shape_of(dim[0])[dim[1]] for dim in layer.dims
        ))
        for layer in layers(program, batch)
    ]  # fmt: skip


def outputs_of(shapes: list[LayerConfig], form: Form = "fp32") -> list[tuple[int, ...]]:
    session = open_session(model_of([(one, form) for one in shapes]), 1)
    return [found.shape for found in session.run(None, random_inputs(session, 1))]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 8, 3, stride=2, padding=1),
                nn.Conv2d(8, 8, 3, padding="same", groups=8),
                nn.Conv2d(8, 12, (1, 3), dilation=2, groups=4),
                nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1, groups=3),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return tuple(found)


def test_convolutions_have_the_shapes_of_the_program() -> None:
    program = trace(Convolutions().eval(), torch.randn(1, 3, 17, 15))
    expected = [tuple(y.shape) for y in program(torch.randn(1, 3, 17, 15))]
    shapes = configs_of(program)
    assert [shape.dims for shape in shapes] == [(3, 8, 3), (8, 8, 1), (8, 12, 2), (12, 6, 2)]
    assert outputs_of(shapes) == expected


def test_other_ranks_have_the_shapes_of_the_program() -> None:
    for make, x in (
        (nn.Conv1d(4, 6, 5, padding=2), torch.randn(1, 4, 9)),
        (nn.Conv3d(2, 4, 3, stride=2), torch.randn(1, 2, 7, 7, 7)),
    ):
        assert outputs_of(configs_of(trace(make.eval(), x))) == [tuple(make(x).shape)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_two_products_per_sample(batch: int) -> None:
    program = trace(Attention().eval(), torch.randn(batch, 10, 24))
    shapes = configs_of(program, batch)
    assert [(shape.kind, shape.dims) for shape in shapes] == [
        ("linear", (10, 24, 72)),
        ("matmul", (1, 4, 10, 6, 10)),
        ("matmul", (1, 4, 10, 10, 6)),
        ("linear", (10, 24, 24)),
    ]
    assert outputs_of(shapes) == [(10, 72), (1, 4, 10, 10), (1, 4, 10, 6), (10, 24)]


def test_what_is_no_layer_is_listed_unless_it_is_free() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()
    )
    found = others(trace(model.eval(), torch.randn(1, 3, 4, 4)))
    assert [str(node.target) for node in found] == ["aten.gelu.default", "aten.max_pool2d.default"]


def square(size: int, kernel: int, channels: int, per_group: int) -> LayerConfig:
    pad = kernel // 2
    geometry = (size, size, kernel, kernel, 1, 1, pad, pad, pad, pad, 1, 1, 0, 0)
    return LayerConfig("conv", geometry, (channels, channels, per_group))


def test_measures_what_is_missing_once(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    small, large = square(16, 3, 8, 8), square(32, 3, 64, 64)  # 256 times the work
    table = Table.open(1, path)
    assert table.fill([small, large, small]) == 2
    first, second = table.us([small, large])
    assert 0 < 4 * first < second
    again = Table.open(1, path)
    assert again.fill([large, small]) == 0
    np.testing.assert_array_equal(again.us([small, large]), [first, second])
    about = again.about([(small, "fp32"), (large, "fp32")])
    assert about["entries"] == 2
    assert about["threads"] == 1
    assert again.notes == []


def test_times_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = square(16, 3, 8, 8), square(16, 3, 16, 16)
    pace = [1.0]

    def measured(entries: Sequence[Entry], threads: int) -> dict[str, float]:
        return {key_of(entry): pace[0] * 50 for entry in entries}

    monkeypatch.setattr("fxprune.latency.table.measure", measured)
    table = Table(Host.here(1), None)
    table.fill([fast])
    pace[0] = 2.0  # everything takes twice as long, the anchors as well
    table.fill([slow])
    assert table.us([fast, slow]).tolist() == [50, 50]


def test_splits_large_tables_into_sessions() -> None:
    table = Table(Host.here(1), None)
    shapes = [square(64, 1, channels, channels) for channels in (64, 72, 80, 88)]
    assert table.fill(shapes) == 4
    assert (table.us(shapes) > 0).all()


def test_damage_is_told_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    table = Table.open(1, path)
    (note,) = table.notes
    assert "damaged" in note
    table.fill([LayerConfig("linear", (), (1, 8, 8))])
    assert Table.open(1, path).notes == []


def test_knows_its_noise_and_age() -> None:
    shape = LayerConfig("linear", (), (1, 8, 8))
    table = Table(Host.here(1), None, {f"fp32 {shape.key}": Timing(2.0, 0.25, 0.0)})
    about = table.about([(shape, "fp32")])
    assert about["noise"] == 0.25
    assert isinstance(about["oldest_days"], float)
    assert about["oldest_days"] > 10000


class Elementwise(nn.Module):
    """Every timed operator that is no layer; a gate that is repeated over places."""

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.adaptive_avg_pool2d(nn.functional.gelu(x), 1).sigmoid()
        y = (x * gate) + nn.functional.hardsigmoid(x)
        return torch.cat([y, y * 0.5, x], 1)


def test_every_operator_is_timed_in_both_forms(tmp_path: Path) -> None:
    program = trace(Elementwise().eval(), torch.randn(2, 4, 6, 5))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    configs = [one for node in nodes if (one := config_of(node, 2)) is not None]
    kinds = [one.kind for one in configs]
    assert kinds == ["gelu", "average", "sigmoid", "mul", "hard-sigmoid",
                     "add", "mul", "concat"]  # fmt: skip
    places = (4, 6, 5)
    assert configs[3] == LayerConfig("mul", (0, 0, 1, 1), (1, *places))
    assert configs[7] == LayerConfig("concat", (1, 4), (1, 6, 5, 4, 4, 4))
    sizes = [(1, *places), (1, 4, 1, 1), (1, 4, 1, 1), *[(1, *places)] * 4, (1, 12, 6, 5)]
    for form in FORMS:
        assert outputs_of(configs, form) == sizes
    table = Table.open(1, tmp_path / "table.json")
    table.fill(configs, forms=FORMS)
    table.fill([conversion("quantize", 90), conversion("dequantize", 90)], forms=FORMS)
    assert all(table.ms(one, form) > 0 for one in configs for form in FORMS)
    assert (
        table.ms(conversion("quantize", 90), "int8")
        == table.us([conversion("quantize", 90)], "int8") / 1e3
    )


def test_what_is_timed_in_int8_computes_in_int8(tmp_path: Path) -> None:
    geometry = (8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    configs = [
        LayerConfig("conv", geometry, (16, 32, 16)), LayerConfig("conv", geometry, (16, 16, 1)),
        LayerConfig("linear", (), (1, 32, 10)), LayerConfig("matmul", (1, 0), (3, 4, 5, 6)),
        LayerConfig("add", (0, 0, 0, 0), (1, 8, 4, 4)), LayerConfig("sigmoid", (), (1, 8, 4, 4)),
        LayerConfig("mul", (0, 0, 1, 1), (1, 8, 4, 4)), LayerConfig("average", (), (1, 8, 4, 4)),
        LayerConfig("concat", (1, 4), (1, 4, 4, 8, 8)),
    ]  # fmt: skip
    path = tmp_path / "timed.onnx"
    path.write_bytes(model_of([(one, "int8") for one in configs]))
    fusion = inspect_fusion(path)
    assert fusion.unfused == ()
    assert fusion.fused == {
        "MatMulIntegerToFloat": 1, "QGemm": 1, "QLinearAdd": 1, "QLinearConcat": 1,
        "QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QLinearMul": 1, "QLinearSigmoid": 1,
    }  # fmt: skip
