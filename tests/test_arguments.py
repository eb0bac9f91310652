from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune import passes
from fxprune.errors import InputError
from fxprune.run.arguments import checked

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
X = torch.randn(32, 4)
ANY: Any = fxprune.compile  # what a user calls who has no type checker


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda: ANY("weights.pt", data=X),
            r"compile: model is the path 'weights.pt', .* fxprune.load_model\('weights.pt'\)",
        ),
        (lambda: ANY(Path("w.pt"), data=X), r"fxprune.load_model\('w.pt'\)"),
        (
            lambda: ANY(MODEL, data=X, pipeline=[passes.FoldBatchNorm()]),
            r"pipeline is a list; write pipeline=fxprune.Pipeline\(\[...\]\)",
        ),
        (
            lambda: ANY(MODEL, data=X, targets="macs=50%"),
            "no option 'targets'; did you mean target",
        ),
        (lambda: ANY(MODEL, data=X, colour=1), "no option 'colour'; it has model, example_inputs"),
        (
            lambda: ANY(),
            r"missing a required argument: 'model'; it is fxprune.compile\(model, ...\)",
        ),
        (
            lambda: ANY({"weight": X}),
            "model is a dict; it must be torch.nn.Module or fxprune.Program",
        ),
        (lambda: ANY(MODEL, data=X, epochs="3"), "epochs is '3'; it must be a whole number"),
        (lambda: ANY(MODEL, data=X, max_drop="1"), "max_drop is '1'; it must be a number or None"),
        (lambda: ANY(MODEL, data=X, attention="haeds"), "heads, head_dim; did you mean 'heads'"),
        (lambda: ANY(MODEL, data=X, target=0.5), "write it as text, such as target='macs=50%'"),
        (lambda: fxprune.export_onnx(MODEL, "x.onnx"), r"export_onnx: program is a module; trace"),  # type: ignore[arg-type]
        (lambda: fxprune.cost(MODEL), r"cost: program is a module; trace it first"),  # type: ignore[arg-type]
        (lambda: fxprune.find_groups("m.pt"), "find_groups: program is the path 'm.pt'"),  # type: ignore[arg-type]
        (lambda: fxprune.inspect(MODEL), "cannot infer the input shape; pass example_inputs"),
    ],
)
def test_an_ordinary_mistake_is_answered_with_the_right_form(
    call: Callable[[], object], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        call()


def test_the_signature_shows_every_option() -> None:
    parameters = inspect.signature(fxprune.compile).parameters
    assert {one.kind for one in parameters.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    document = inspect.getdoc(fxprune.compile) or ""
    assert [name for name in parameters if f"    {name}: " not in document] == []


def test_a_type_checker_knows_every_option() -> None:
    with pytest.raises(InputError, match="did you mean epochs"):  # mypy fails on an unused ignore
        fxprune.compile(MODEL, data=X, epochz=3)  # type: ignore[call-arg]


def test_arguments_that_are_right_pass() -> None:
    @checked
    def scale(x: Any, by: float = 1.0, *, times: int | None = None) -> Any:
        return x * by * (times or 1)

    two: Any = np.int64(2)
    three: Any = np.float32(3)
    assert scale(2, three, times=two) == 12
    assert scale(2, 3) == 6
    assert scale.__name__ == "scale"
