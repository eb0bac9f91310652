from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.data.roles import as_data
from fxprune.errors import InputError, PostconditionError
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.onnx.export import ExportCheck
from fxprune.report.content import Check
from fxprune.run.checks import accuracy_limit, check_data, check_removal, result_checks
from fxprune.run.compile import compile
from fxprune.structure.groups import Group, find_groups
from fxprune.structure.rules.registry import operator_rule
from fxprune.structure.verify import RemovalCheck, failing_groups, sample_units
from fxprune.training.evaluate import Evaluation


@pytest.fixture
def program() -> Program:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return trace(model, (torch.randn(1, 5),))


def test_removal_is_exact(program: Program) -> None:
    check, failing = check_removal(program, find_groups(program), 0)
    assert not failing
    assert check.ran
    assert check.passed
    assert check.note == "4 random units of 2 groups"


def test_mixed_units_are_not_claimed() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    program = trace(model, (torch.randn(1, 5),))
    check, _ = check_removal(program, find_groups(program), 0)
    assert not check.ran
    assert check.note == "a normalisation mixes the units of every group"
    alone = trace(nn.Linear(5, 3), (torch.randn(1, 5),))
    check, _ = check_removal(alone, find_groups(alone), 0)
    assert check.note == "there is no group with removable units"


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh().cumsum(1)).relu())  # type: ignore[no-any-return]


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a rule by which running sums do not depend on earlier channels."""
    monkeypatch.setattr("fxprune.graph.operators._registered", {})
    monkeypatch.setattr("fxprune.structure.rules.registry._registered", {})
    operator_rule(torch.ops.aten.cumsum, pointwise=True)


@pytest.mark.usefixtures("wrong_rule")
def test_a_group_whose_removal_is_not_exact_is_told_apart() -> None:
    program = trace(Summed().eval(), (torch.randn(1, 5),))
    check, failing = check_removal(program, find_groups(program), 0)
    ((group, why),) = failing.items()
    assert group.name == "first.weight:0"
    assert "removing units changes the output by" in why
    assert check.passed
    assert (
        check.note == "3 random units of 1 group; 1 group that cannot be removed keep their shapes"
    )


def raising(program: Program, chosen: Mapping[Group, Sequence[int]]) -> RemovalCheck:
    """Stand for a removal that breaks the graph of the second layer."""
    if any(group.name.startswith("second") for group in chosen):
        raise PostconditionError("the graph does not run")
    return RemovalCheck(0.0)


def test_a_group_whose_removal_raises_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.structure.verify.verify_removal", raising)
    program = trace(Summed().eval(), (torch.randn(1, 5),))
    monkeypatch.setattr("fxprune.graph.operators._registered", {})
    monkeypatch.setattr("fxprune.structure.rules.registry._registered", {})
    operator_rule(torch.ops.aten.cumsum, pointwise=True)
    found = failing_groups(program, sample_units(find_groups(program), 0.5), 1e-5)
    assert [group.name for group in found] == ["second.weight:0"]
    assert "(PostconditionError: the graph does not run)" in next(iter(found.values()))


@pytest.mark.usefixtures("wrong_rule")
def test_a_compile_freezes_the_group_and_goes_on(tmp_path: Path) -> None:
    data = [(torch.randn(5), n % 3) for n in range(40)]
    result = compile(
        Summed().eval(), data=data, pipeline="annotate-sensitivity{criterion=magnitude-l2},"
        "plan-channels{params=147},remove-channels", int8=False, out=tmp_path,
        latency_seconds=0.2,
    )  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in result.program.graph_module.named_parameters()}
    assert shapes["first.weight"] == (8, 5)
    assert shapes["second.weight"][0] < 12
    frozen = {item.name: item.frozen_because for item in result.report.groups}
    assert "removing units changes the output" in (frozen["first.weight:0"] or "")


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
