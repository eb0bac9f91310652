from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import InputError

X = torch.randn(40, 4)
Y = (X[:, 0] > 0).long()


def model() -> nn.Sequential:
    """Predicts the sign of the first input, and so is always right."""
    found = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        found[0].weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))  # type: ignore[operator]
    return found


def test_all_names_are_there() -> None:
    assert all(hasattr(fxprune, name) for name in fxprune.__all__)
    assert fxprune.__version__.count(".") == 2


def test_evaluates_a_module_a_program_and_a_file(tmp_path: Path) -> None:
    data = {"train": (X, Y), "eval": (X[:10], Y[:10])}
    program = fxprune.trace(model(), (X[:2],))
    fxprune.export_onnx(program, tmp_path / "model.onnx")
    for one in (model(), program, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        found = fxprune.evaluate(one, data, batch_size=4)
        assert (found.accuracy, found.predictions) == (1.0, 10)
    wrong = {"train": (X, Y), "eval": (X[:10], 1 - Y[:10])}
    assert fxprune.evaluate(model(), wrong).accuracy == 0.0


def test_evaluation_leaves_the_mode_of_a_module() -> None:
    trained = model().train()
    fxprune.evaluate(trained, (X, Y))
    assert trained.training


def test_evaluates_a_file_of_a_fixed_batch(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 4) * torch.tensor([-1.0, 0, 0, 0]) + 0

    program = fxprune.trace(Fixed(), (X[:4],))
    fxprune.export_onnx(program, tmp_path / "fixed.onnx")
    assert fxprune.evaluate(tmp_path / "fixed.onnx", (X, Y)).predictions == 8


def test_without_evaluation_samples_there_is_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no 'eval' samples"):
        fxprune.evaluate(model(), {"train": (X, Y), "eval": None})
    with pytest.raises(InputError, match="there is no file"):
        fxprune.evaluate(tmp_path / "none.onnx", (X, Y))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match="is not an ONNX model"):
        fxprune.evaluate(tmp_path / "text.onnx", (X, Y))


def test_inspects_a_module_by_inputs_or_data() -> None:
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    by_data, by_inputs = fxprune.inspect(chain, data=(X, Y)), fxprune.inspect(chain, (X[:1],))
    assert by_data == by_inputs == fxprune.inspect(fxprune.trace(chain, (X[:1],)))
    assert [group.name for group in by_data.groups if not group.frozen_because] == ["0.weight:0"]


def test_benches_files_by_path(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fxprune.export_onnx(fxprune.trace(model(), (X[:2],)), path)
    assert set(fxprune.bench(path, seconds=0)) == {str(path)}
    found = fxprune.bench([path, str(path)], seconds=0.01)
    assert found[str(path)].runs >= 20


def test_a_notebook_shows_tables_and_not_tensors() -> None:
    chain = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2))
    program = fxprune.trace(chain, (X[:1],))
    groups = fxprune.find_groups(program)
    assert repr(program) == "Program(3 calls, 2,102 parameters, inputs 1x4)"
    assert repr(groups) == "Groups(3 groups, 2 frozen)"
    assert repr(groups[0]) == "Group(0.weight:0, 300 units, 3 slots)"
    result = fxprune.compile(program, (X[:1],), pipeline="fold-batchnorm", target="macs=10%")
    assert repr(result) == (
        "Result(parameters 2,102 -> 2,102, MACs 1,800 -> 1,800, target macs=10% not met)"
    )
    for one in (program, groups, result):
        html = one._repr_html_()
        assert html.count("<table>") == 1
        assert len(html) < 4000
