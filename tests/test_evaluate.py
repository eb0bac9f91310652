from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxprune.calibration.outputs import class_axis, logits_of
from fxprune.calibration.running import fixed_batch
from fxprune.data.datasets import Samples
from fxprune.data.roles import as_data
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.onnx.export import export_onnx
from fxprune.training.evaluate import Evaluation, evaluate, run_onnx, run_program

COUNT = 23


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(1, 6),))


def samples(x: Tensor, y: Tensor | None = None) -> Samples:
    found = as_data({"eval": x if y is None else (x, y), "calibration": x}).eval
    assert found is not None
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_accuracy_is_the_share_of_right_labels(program: Program, batch_size: int) -> None:
    x, y = torch.randn(COUNT, 6), torch.randint(4, (COUNT,))
    right = (program(x).argmax(1) == y).sum().item()
    found = evaluate(run_program(program), samples(x, y), batch_size=batch_size)
    assert found == Evaluation(right / COUNT, COUNT)


def test_a_fixed_batch_is_filled_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    fixed = trace(model, (torch.randn(5, 6),), dynamic={})
    assert fixed_batch(fixed) == 5
    x, y = torch.randn(COUNT, 6), torch.randint(4, (COUNT,))
    found = evaluate(run_program(fixed), samples(x, y), fixed_batch=5)
    assert found.accuracy == (model(x).argmax(1) == y).sum().item() / COUNT


def test_onnx_runtime_agrees(program: Program, tmp_path: Path) -> None:
    export_onnx(program, tmp_path / "model.onnx")
    x, y = torch.randn(COUNT, 6), torch.randint(4, (COUNT,))
    run = run_onnx(tmp_path / "model.onnx", threads=1)
    assert evaluate(run, samples(x, y), batch_size=7) == evaluate(
        run_program(program), samples(x, y)
    )


def test_without_labels_the_dense_model_is_the_judge(program: Program) -> None:
    x = torch.randn(COUNT, 6)
    other = program.copy()
    with torch.no_grad():
        other.tensor("2.weight").neg_()
    share = (program(x).argmax(1) == other(x).argmax(1)).float().mean().item()
    dense = run_program(program)
    found = evaluate(run_program(other), samples(x), reference=dense, batch_size=4)
    assert found.accuracy == pytest.approx(share)
    assert found.note == "the data has no labels: accuracy is the agreement with the dense model"
    assert evaluate(dense, samples(x), reference=dense).accuracy == 1.0
    assert evaluate(dense, samples(x)).accuracy is None


def test_targets_that_are_not_classes_have_no_accuracy(program: Program) -> None:
    found = evaluate(run_program(program), samples(torch.randn(5, 6), torch.randn(5, 4)))
    assert (found.accuracy, found.note) == (
        None,
        "the targets are not classes, so there is no accuracy",
    )


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (3, 5, 7)])
def test_dense_predictions_count_pixels_and_tokens(shape: tuple[int, ...]) -> None:
    """Classes lie along axis 1 for pixels (N, C, H, W) and along the last one for tokens."""
    logits = torch.randn(shape)
    axis = 1 if len(shape) == 4 else -1
    wanted = logits.argmax(axis)
    wanted.view(-1)[0] = -100
    wanted.view(-1)[1] = (wanted.view(-1)[1] + 1) % logits.shape[axis]
    assert class_axis(logits, wanted) == axis
    found = evaluate(lambda inputs: logits, samples(torch.zeros(3, 1), wanted), batch_size=3)
    assert found == Evaluation((wanted.numel() - 2) / (wanted.numel() - 1), wanted.numel() - 1)


def test_one_logit_means_two_classes() -> None:
    logits = torch.tensor([[2.0], [-1.0], [0.5]])
    found = evaluate(lambda inputs: logits, samples(torch.zeros(3, 1), torch.tensor([1, 0, 0])))
    assert found.accuracy == pytest.approx(2 / 3)


def test_the_logits_are_found_among_outputs() -> None:
    hidden, logits = torch.zeros(2, 3), torch.ones(2, 5)
    assert logits_of({"hidden": hidden, "logits": logits}) is logits
    assert logits_of((logits, hidden)) is logits
