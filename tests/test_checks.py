from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.data.roles import as_data
from fxprune.errors import InputError, PostconditionError
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.onnx.export import ExportCheck
from fxprune.report.content import Check
from fxprune.run import checks
from fxprune.run.checks import accuracy_limit, check_data, check_removal, result_checks
from fxprune.structure.groups import Group, find_groups
from fxprune.structure.verify import RemovalCheck
from fxprune.training.evaluate import Evaluation


@pytest.fixture
def program() -> Program:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return trace(model, (torch.randn(1, 5),))


def test_removal_is_exact(program: Program) -> None:
    check = check_removal(program, find_groups(program), 0)
    assert check.ran
    assert check.passed
    assert check.note == "4 random units of 2 groups"


def test_mixed_units_are_not_claimed() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    program = trace(model, (torch.randn(1, 5),))
    check = check_removal(program, find_groups(program), 0)
    assert not check.ran
    assert check.note == "a normalisation mixes the units of every group"
    alone = trace(nn.Linear(5, 3), (torch.randn(1, 5),))
    assert (
        check_removal(alone, find_groups(alone), 0).note == "there is no group with removable units"
    )


def test_removal_that_is_not_exact_names_the_group(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(program: Program, doomed: Mapping[Group, Sequence[int]]) -> RemovalCheck:
        wrong = any(group.name.startswith("2.weight") for group in doomed)
        return RemovalCheck(0.5 if wrong else 0.0)

    monkeypatch.setattr(checks, "verify_removal", verify)
    with pytest.raises(PostconditionError, match=r"by 5.0e-01 .*because of 2\.weight:0; protect"):
        check_removal(program, find_groups(program), 0)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (
            torch.randn(4, 6),
            torch.zeros(4, dtype=torch.long),
            "are 6, but the model takes 5",
        ),
        (torch.randn(4, 5), torch.full((4,), 3), "the label 3, but the model's 3 outputs"),
        (torch.randn(4, 5), torch.full((4,), -1), "the label -1"),
    ],
)
def test_data_that_do_not_suit(
    program: Program, x: torch.Tensor, y: torch.Tensor, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        check_data(as_data((x, y)), program)


@pytest.mark.parametrize("y", [torch.randn(4), torch.randn(4, 3), None])
def test_targets_that_are_not_labels_pass(program: Program, y: Any) -> None:
    x = torch.randn(4, 5)
    check_data(as_data(x if y is None else (x, y)), program)


def test_the_result_is_judged() -> None:
    export, right = ExportCheck(1e-6, 10), Evaluation(0.9, 100)
    found = result_checks(export, right, right, Evaluation(0.885, 100), 1.0)
    assert {name: check.passed for name, check in found.items()} == {
        "onnx_parity": True, "onnx_accuracy": False, "max_drop": False,
    }  # fmt: skip
    unknown = Evaluation(None, 0, "no labels")
    found = result_checks(ExportCheck(None, 10), unknown, unknown, unknown, 1.0)
    assert not found["onnx_parity"].ran
    assert (found["onnx_accuracy"].ran, found["onnx_accuracy"].note) == (False, "no labels")
    assert found["max_drop"].passed is False


def test_accuracies_on_codes_may_differ_as_predictions_may() -> None:
    assert accuracy_limit({}) == 0.005
    assert accuracy_limit({"int8_agreement": Check.skipped("no data")}) == 0.005
    limit = accuracy_limit({"int8_agreement": Check.of(0.02, 0.038)})
    right, in_file = Evaluation(0.786, 500), Evaluation(0.798, 500)
    found = result_checks(ExportCheck(1e-6, 10), right, right, in_file, None, limit)
    assert found["onnx_accuracy"].passed
