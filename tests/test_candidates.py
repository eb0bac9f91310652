from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_nets import Shortcuts
from torch import nn

import fxprune
from fxprune.errors import InputError
from fxprune.onnx.benchmark import Latency
from fxprune.onnx.export import ExportCheck
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.passes import TrainQuantized
from fxprune.pipeline.contract import Outcome
from fxprune.pipeline.progress import Tracker
from fxprune.report.content import Check
from fxprune.report.precision import Precision
from fxprune.run.candidates import Measured, Measurements, choose
from fxprune.run.compile import Result
from fxprune.run.measure import Emission, Exported, time_files
from fxprune.training.evaluate import Evaluation

PROGRAM: Any = object()  # nothing looks at it
JOURNAL: Any = object()
QUICK: dict[str, Any] = {
    "latency_seconds": 0.02,
    "verify": False,
    "progress": Tracker(False),
}


def emission(speedup: float) -> Emission:
    latency = Latency(1 / speedup, 0.0, 0.0, 9, speedup, speedup, speedup)
    return Emission(Path("model.onnx"), ExportCheck(0.0, int(100 / speedup)), latency)


def measured(pace: float, accuracy: float, checks: Mapping[str, Check] | None = None) -> Measured:
    return Measured(PROGRAM, JOURNAL, emission(pace), Evaluation(accuracy, 1000), checks or {})


def chosen(
    pace: float = 2.0, accuracy: float = 0.9, *, free: bool = True, failed: tuple[str, ...] = (),
    lowest: float | None = None,
) -> Precision:  # fmt: skip
    checks = {name: Check.of(1, 0) for name in failed}
    both = {"fp32": measured(1.0, 0.9), "int8": measured(pace, accuracy, checks)}
    found = choose(Measurements(emission(1.0), both), free=free, min_accuracy=lowest)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_int8_is_kept_if_it_is_faster_and_as_accurate() -> None:
    found = chosen()
    assert (found.kept, found.why, found.speedup) == ("int8", "2.00x as fast as FP32", 2.0)
    assert found.summary == (
        "kept INT8: 2.00x as fast as FP32; "
        "INT8 / FP32: 0.500 / 1.000 ms, 50 / 100 bytes, 90.00 / 90.00 %"
    )


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (chosen(0.8), "INT8 is not faster than FP32 (0.80x)"),
        (chosen(accuracy=0.89), "INT8 loses 1.00 percentage points more accuracy"),
        (
            chosen(accuracy=0.897, lowest=0.899),
            "INT8 loses 0.30 percentage points more accuracy, which exceeds max-drop",
        ),
        (chosen(failed=("int8_fused",)), "INT8 failed the check int8_fused"),
    ],
)
def test_fp32_is_kept_if_int8_is_worse(found: Precision, why: str) -> None:
    assert (found.kept, found.why) == ("fp32", why)


def test_int8_that_was_asked_for_is_kept_and_its_slowness_is_reported() -> None:
    found = chosen(0.8, accuracy=0.5, free=False)
    assert found.kept == "int8"
    assert found.why == "as requested, although INT8 is not faster than FP32 (0.80x)"


def test_without_fp32_there_is_no_comparison() -> None:
    alone = Measurements(emission(1.0), {"int8": measured(2.0, 0.9)})
    found = choose(alone, free=True, min_accuracy=None)
    assert found is not None
    assert (found.kept, found.fp32) == ("int8", None)
    assert "resumed" in found.summary


def compiled(model: nn.Module, monkeypatch: pytest.MonkeyPatch, pace: float, **more: Any) -> Result:
    """Compile with the default pipeline, INT8 being so many times as fast."""
    real = time_files

    def hurried(files: dict[str, Exported], *rest: Any) -> dict[str, Emission]:
        found = real(files, *rest)
        if "int8" in found:
            times = replace(found["fp32"].latency, speedup=pace * found["fp32"].latency.speedup)
            found["int8"] = replace(found["int8"], latency=times)
        return found

    monkeypatch.setattr("fxprune.run.candidates.time_files", hurried)
    torch.manual_seed(0)
    x = torch.randn(96, 3, 8, 8)
    with torch.no_grad():
        data = {"calibration": (x, model.eval()(x).argmax(1))}
    options: dict[str, Any] = {"target": "params=80%"} | QUICK | more
    return fxprune.compile(model, data=data, **options)


@pytest.mark.parametrize(("pace", "kept"), [(2.0, "int8"), (0.5, "fp32")])
def test_the_faster_precision_is_written(
    pace: float, kept: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = compiled(Shortcuts(), monkeypatch, pace, out=tmp_path)
    precision = result.report.precision
    assert precision is not None
    assert precision.kept == kept
    assert is_quantized(result.program) == (kept == "int8")
    assert ("int8_fused" in result.report.checks) == (kept == "int8")
    assert ("convert-quantized" in (tmp_path / "recipe.toml").read_text()) == (kept == "int8")
    own = getattr(precision, kept)
    assert own.onnx_bytes == (tmp_path / "model.onnx").stat().st_size
    assert own.onnx_bytes == result.report.after.onnx_bytes
    assert own.accuracy == result.report.after.accuracy
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(
        [".html", ".json", ".onnx", ".pt2", ".toml"]
    )
    assert precision.summary in (tmp_path / "report.html").read_text()


def test_fp32_is_kept_if_int8_conversion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Outcome:
        raise InputError("no such luck")

    monkeypatch.setattr(TrainQuantized, "run", fail)
    precision = compiled(Shortcuts(), monkeypatch, 2.0).report.precision
    assert precision is not None
    assert precision.summary == "kept FP32: INT8 conversion failed: no such luck"


@pytest.mark.parametrize("place", ["passes", "export"])
def test_int8_that_was_asked_for_and_fails_leaves_the_fp32_result(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a kernel is missing\nin line 3")

    if place == "passes":
        monkeypatch.setattr(TrainQuantized, "run", fail)
    else:
        monkeypatch.setattr("fxprune.run.candidates.check_quantized", fail)
    result = compiled(Shortcuts(), monkeypatch, 2.0, int8=True, out=tmp_path)
    assert not is_quantized(result.program)
    assert (tmp_path / "model.onnx").exists()
    assert not result.report.ok
    note = result.report.checks["int8"].note
    assert note is not None
    assert "unexpected RuntimeError: a kernel is missing; please report" in note
    assert result.report.precision is not None
    assert result.report.precision.kept == "fp32"


def test_a_model_without_layers_to_quantize_stays_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(16, 3))
            self.second = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.mean((2, 3)) @ self.first.T) @ self.second.T

    precision = compiled(Scaled(), monkeypatch, 2.0, target="params=75%").report.precision
    assert precision is not None
    assert precision.summary == "kept FP32: no layer of this model can be quantised"


def test_fp32_that_was_asked_for_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compiled(Shortcuts(), monkeypatch, 2.0, int8=False)
    assert result.report.precision is None
    assert not is_quantized(result.program)
