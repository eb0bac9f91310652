from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from support import trace
from torch import Tensor, nn

import fxprune
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.comparison import relative_error
from fxprune.graph.program import Program
from fxprune.onnx.export import BEYOND_STANDARD, export_onnx
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.passes import ConvertQuantized, InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.training.evaluate import run_onnx


class Tokens(nn.Module):
    """Linear layers on rows of tokens, and a SiLU between two convolutions that run in INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 8, 1)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.functional.silu(self.first(x.mT))).mT
        return self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


X = torch.randn(32, 6, 8)


@pytest.fixture
def converted() -> Program:
    program = trace(Tokens().eval(), X[:2])
    with torch.no_grad():
        program.tensor("up.bias").normal_()
    context = Context(Data(Arrays(X)), dense=program.copy())
    for step in (InsertObservers(measure=False), TrainQuantized(samples=32), ConvertQuantized()):
        step(program, context)
    return program


def operators(path: Path) -> Counter[str]:
    return Counter(f"{node.domain}.{node.op_type}" for node in onnx.load(path).graph.node)


def test_int8_uses_faster_operators_and_the_file_lists_them(
    converted: Program, tmp_path: Path
) -> None:
    path = tmp_path / "fast.onnx"
    check = export_onnx(converted, path)
    names = ("com.microsoft.MatMulIntegerToFloat", "com.microsoft.QuickGelu")
    assert check.beyond_standard == names
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata[BEYOND_STANDARD] == ", ".join(names)
    found = operators(path)
    assert [found[name] for name in names] == [1, 1]  # the layer without a bias stays
    assert inspect_fusion(path).fused["MatMulIntegerToFloat"] == 2
    with torch.no_grad():
        expected = converted(X)
    assert relative_error(run_onnx(path)((X,)), expected) < 0.02


def test_standard_files_have_standard_operators_only(converted: Program, tmp_path: Path) -> None:
    fast, standard = tmp_path / "fast.onnx", tmp_path / "standard.onnx"
    export_onnx(converted, fast)
    check = export_onnx(converted, standard, standard=True)
    assert check.beyond_standard == ()
    assert {name.rpartition(".")[0] for name in operators(standard)} == {""}
    assert not any(entry.key == BEYOND_STANDARD for entry in onnx.load(standard).metadata_props)
    assert relative_error(run_onnx(standard)((X,)), run_onnx(fast)((X,))) < 0.02


def test_fp32_needs_no_other_operators(tmp_path: Path) -> None:
    program = trace(Tokens().eval(), X[:2])
    assert export_onnx(program, tmp_path / "fp32.onnx").beyond_standard == ()
    assert {name.rpartition(".")[0] for name in operators(tmp_path / "fp32.onnx")} == {""}


@pytest.mark.parametrize("standard", [False, True])
def test_the_report_names_operators_beyond_the_standard(standard: bool, tmp_path: Path) -> None:
    passes = "insert-observers{measure=false},train-quantized{samples=32},convert-quantized"
    result = fxprune.compile(
        Tokens().eval(), data={"calibration": X}, pipeline=passes, out=tmp_path,
        standard_onnx=standard, latency_seconds=0.01,
    )  # fmt: skip
    named = [note for note in result.report.notes if "only ONNX Runtime has" in note]
    assert len(named) == (0 if standard else 1)
    domains = {name.rpartition(".")[0] for name in operators(tmp_path / "model.onnx")}
    assert domains == ({""} if standard else {"", "com.microsoft"})
    assert ("standard_onnx" in (tmp_path / "recipe.toml").read_text()) == standard
