from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tools.coverage_checks import examine
from tools.coverage_models import enliven, listed, suites
from tools.coverage_table import markdown, summary


def test_a_small_model_passes_every_step() -> None:
    steps: list[str] = []
    record = examine("layers", "two-inputs", False, lambda told: steps.append(told["step"]))
    assert record["failed"] is None, record["why"]
    assert steps == ["build", "trace", "groups", "dense forward", "branches", "exactness",
                     "removal", "forward", "backward", "done"]  # fmt: skip
    assert record["share"] > 0.9
    assert record["params_left"] < 0.6
    assert record["error"] <= 1e-5
    assert record["changed"] > 0.01, "what was removed did not matter"


def test_residual_branches_are_removed_too() -> None:
    record = examine("layers", "torch-encoder", False, lambda _: None)
    assert record["failed"] is None, record["why"]
    assert (record["branches"], record["branches_removed"]) == (4, 2)
    assert record["branches_error"] <= 1e-5


def test_a_failure_is_a_line_of_the_table() -> None:
    record = examine("layers", "no such model", False, lambda _: None)
    assert record["failed"] == "build"
    assert "no such model" in record["why"]
    assert "FAILED layers:no such model at build" in summary([record])
    assert "**layers:no such model** at build" in markdown([record], "the command")


def test_memory_is_told_beside_that_of_a_forward() -> None:
    measured = [
        {"suite": "s", "model": str(forward), "failed": None, "groups_peak_mib": 2.0,
         "forward_peak_mib": forward}
        for forward in (4.0, 8.0, 8.0)
    ]  # fmt: skip
    page = markdown(measured, "the command")
    assert "| 0.25, 0.50 |" in page
    assert "| 2 of 4 | passes |" in page


def test_untrained_norms_and_scales_are_made_to_matter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    enliven(model)
    assert not model.training
    for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
        assert isinstance(tensor, torch.Tensor)
        assert tensor.std() > 0


def test_every_architecture_module_has_one_model() -> None:
    text = (Path(__file__).parent.parent / "tools" / "coverage_timm.txt").read_text()
    modules = [line.split("#")[1].split(",")[0] for line in text.splitlines() if line[0] != "#"]
    assert len(modules) == len(set(modules)) == len(listed())
    assert suites()["timm"]() == listed()
