from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.comparison import relative_error
from fxprune.graph.program import Program
from fxprune.latency import table as latency_table
from fxprune.latency.table import ANCHOR_ENTRIES, key_of
from fxprune.latency.timed_model import Entry
from fxprune.onnx.export import export_onnx
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.passes import ConvertQuantized, FoldBatchNorm, InsertObservers, TrainQuantized
from fxprune.pipeline.context import Context
from fxprune.quantization.activations import decompose, element_wise
from fxprune.training.evaluate import run_onnx

X = torch.randn(32, 3, 12, 12)


class Gated(nn.Module):
    """An inverted residual with a squeeze-and-excitation gate, and one activation or another."""

    def __init__(self, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.act, self.gate = activation, gate
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 12, 1)
        self.last, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.expand(x)))
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        x = x * self.gate(self.excite(self.squeeze(pooled).relu()))
        x = self.project(x)
        x = x + self.act(self.last(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


MODELS = {
    "silu": (nn.SiLU(), nn.Sigmoid()),
    "hardswish": (nn.Hardswish(), nn.Hardsigmoid()),
}


def made(name: str) -> tuple[Program, Context]:
    model = randomise_norms(Gated(*MODELS[name]))
    program = trace(model.eval(), X[:2])
    context = Context(Data(Arrays(X)), dense=program.copy())
    FoldBatchNorm()(program, context)
    return program, context


@pytest.mark.parametrize("name", list(MODELS))
def test_spelled_activations_compute_the_same(name: str) -> None:
    program, _ = made(name)
    expected = program(X)
    found = element_wise(program)
    assert len(found) == 4  # two activations, the gate and its product
    runs = decompose(program, found)
    assert runs <= set(program.graph.nodes)
    torch.testing.assert_close(program(X), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def int8_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def use() -> None:
        def measured(entries: Sequence[Entry], threads: int) -> dict[str, float]:
            found = {key_of(entry): 5.0 if entry[1] == "int8" else 20.0 for entry in entries}
            return found | {key_of(anchor): 50.0 for anchor in ANCHOR_ENTRIES}

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(latency_table, "measure", measured)

    return use


@pytest.mark.parametrize("name", list(MODELS))
def test_chosen_activations_run_in_int8_and_both_runtimes_agree(
    name: str, int8_is_faster: Callable[[], None], tmp_path: Path
) -> None:
    int8_is_faster()
    program, context = made(name)
    exact = program(X)
    InsertObservers(reduce_range=True)(program, context)
    TrainQuantized(samples=32)(program, context)
    simulated = program.eval()(X)
    ConvertQuantized()(program, context)
    with torch.no_grad():
        converted = program(X)
    assert relative_error(simulated, converted) < 0.02
    assert relative_error(exact, converted) < 0.12
    path = tmp_path / "model.onnx"
    export_onnx(program, path)
    fusion = inspect_fusion(path)
    assert fusion.unfused == ()
    # One product per activation and one with the gate; sums: the residual and those with 3.
    assert fusion.fused["QLinearMul"] == 3
    gates = {"silu": ("QLinearSigmoid", 3), "hardswish": ("QLinearAdd", 4)}
    operator, count = gates[name]
    assert fusion.fused[operator] == count
    assert fusion.fused["QLinearConv"] == 5
    assert relative_error(run_onnx(path)((X,)), converted) < 0.02
