"""Outputs that are not numbers pass no check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PostconditionError
from fxprune.graph.first_nan import first_nan
from fxprune.graph.program import Program
from fxprune.onnx import export
from fxprune.pipeline.progress import Tracker
from fxprune.run.checks import check_finite_outputs

QUICK: dict[str, Any] = {"latency_seconds": 0.02, "progress": Tracker(False), "int8": False}


class Two(nn.Module):
    """Two outputs, of which only the first is looked at for accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        return self.first(y), self.second(y)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 8), torch.arange(64) % 4


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_that_gives_nan_is_refused_with_the_place(labelled: bool) -> None:
    model = Two().eval()
    with torch.no_grad():
        model.second.weight.fill_(torch.nan)
    x, y = data()
    with pytest.raises(InputError, match=r"NaN first appears in the tensor second\.weight"):
        fxprune.compile(model, data=(x, y) if labelled else x, **QUICK)


def test_samples_with_nan_are_refused() -> None:
    x, y = data()
    x[:, 2] = torch.nan
    with pytest.raises(InputError, match="NaN first appears in the input"):
        fxprune.compile(Two().eval(), example_inputs=(torch.randn(2, 8),), data=(x, y), **QUICK)


def test_nan_that_no_output_shows_does_not_count() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).div(0).nan_to_num(nan=1.0) + x

    assert first_nan(fxprune.trace(Masked(), (torch.ones(2, 3),)), (torch.ones(2, 3),)) is None


def test_a_result_that_gives_nan_fails_a_check() -> None:
    dense = fxprune.trace(Two().eval(), (torch.randn(2, 8),))
    small = dense.copy()
    assert check_finite_outputs(dense, small, [(torch.randn(5, 8),)]).value == 0
    with torch.no_grad():
        small.tensor("second.bias")[1] = torch.inf
    check = check_finite_outputs(dense, small, [(torch.randn(5, 8),)])
    assert (check.passed, check.value) == (False, 7), "two samples and five, one value each"


def test_a_file_that_gives_nan_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(program: Program, path: Path, extras: tuple[str, ...] = ()) -> None:
        write(program, path, extras)
        model = onnx.load(path)
        for item in model.graph.initializer:
            array = numpy_helper.to_array(item).copy()
            array[...] = array if array.dtype.kind == "i" else float("nan")
            item.CopyFrom(numpy_helper.from_array(array, item.name))
        onnx.save(model, path)

    write = export._write
    monkeypatch.setattr(export, "_write", spoiled)
    program = fxprune.trace(Two().eval(), (torch.randn(2, 8),))
    with pytest.raises(PostconditionError, match="differs from PyTorch's in which values are NaN"):
        export.export_onnx(program, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
