from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import trace
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError
from fxprune.graph.facts import PLAN, SENSITIVITY, Sensitivity
from fxprune.graph.program import Program
from fxprune.latency.bench import LAYERS, Bench, calibrate
from fxprune.latency.cache import Host
from fxprune.latency.model import Calibration
from fxprune.latency.plan import MEASURED_TOLERANCE, solve_and_try
from fxprune.latency.table import Table
from fxprune.onnx.profile import Profiled
from fxprune.passes import AnnotateSensitivity, PlanChannels, RemoveChannels
from fxprune.pipeline.context import Context
from fxprune.planning.budget import Quantity
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.problem import Problem
from fxprune.structure.groups import find_groups
from fxprune.structure.merging import Ints


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_calibration_splits_the_profile_and_keeps_the_whole() -> None:
    nodes = {
        "a": Profiled("Conv", (100.0, 500.0, 100.0, 900.0)),
        "b": Profiled("Gemm", (20.0, 20.0, 20.0)),
        "c": Profiled("Relu", (31.0, 30.0)),
    }
    assert nodes["a"].operator in LAYERS
    how = calibrate(nodes, whole=0.2, us=60.0, elements=1000.0)
    assert how.per_us == pytest.approx(0.12 / 60)
    assert how.per_element == pytest.approx(0.03 / 1000)
    assert how.fixed == pytest.approx(0.05)


@pytest.mark.parametrize(("us", "elements"), [(0.0, 10.0), (10.0, 0.0), (0.0, 0.0), (10.0, 10.0)])
@pytest.mark.parametrize("whole", [0.001, 0.2])
def test_the_dense_latency_is_always_right(us: float, elements: float, whole: float) -> None:
    """Also where the profile's own cost exceeds the network's."""
    nodes = {"a": Profiled("Conv", (5.0,)), "b": Profiled("Relu", (5.0,))}
    how = calibrate(nodes, whole, us, elements)
    assert how.fixed >= -1e-12
    assert how.fixed + how.per_us * us + how.per_element * elements == pytest.approx(whole)


@dataclass(frozen=True, eq=False)
class Line:
    """Latency falls by a thousandth of the whole with every unit of the one group."""

    quantities: tuple[Quantity, ...] = ("latency_ms",)

    def values(self, removed: Ints) -> Floats:
        return 1 - removed / 1000

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        return (removed[groups] - counts)[:, None] / 1000


@dataclass(frozen=True, eq=False)
class Pretended(Bench):
    """A bench whose programs are numbers of units, all of them slower than predicted."""

    slower: float = 1.0
    measured: list[float] = field(default_factory=list)

    def predict(self, program: Any) -> float:
        return 1 - float(program) / 1000

    def measure(self, program: Any) -> float:
        self.measured.append(self.slower * self.predict(program))
        return self.measured[-1]


def bench(slower: float) -> Pretended:
    table = Table(Host.here(1), None)
    return Pretended(Path(), table, 1.0, Calibration(1, 1, 0), slower=slower)


def problem(limit: float) -> Problem:
    loss = np.square(np.arange(1000, dtype=np.float64))
    return Problem(
        ("g",), Line(), np.array([limit]), (loss,), ((np.arange(1000),),), ("1",)
    )  # fmt: skip


def cut(removed: Ints) -> Any:
    return int(removed[0])


@pytest.mark.parametrize("slower", [0.7, 1.0, 1.2])
def test_a_plan_that_misses_is_corrected(slower: float) -> None:
    used = bench(slower)
    found, told = solve_and_try(problem(0.6), used, cut, corrections=2)
    assert used.measured[-1] == told["measured_ms"] == pytest.approx(0.6, rel=MEASURED_TOLERANCE)
    assert len(used.measured) == told["plans"] == (1 if slower == 1.0 else 2)
    assert (
        found.values[-1]
        == told["predicted_ms"]
        == pytest.approx(0.6 / slower, rel=MEASURED_TOLERANCE)
    )
    assert found.notes == ()


def test_without_corrections_nothing_is_measured() -> None:
    used = bench(1.5)
    found, told = solve_and_try(problem(0.6), used, cut, corrections=0)
    assert used.measured == []
    assert told["measured_ms"] is None
    assert found.values[-1] == pytest.approx(0.6, rel=0.02)


def test_a_plan_that_still_misses_is_told() -> None:
    worse = replace(bench(1.0))
    object.__setattr__(worse, "measure", lambda _: 0.9)
    found, _ = solve_and_try(problem(0.6), worse, cut, corrections=1)
    assert "50.0% over its budget" in found.notes[-1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.c, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu())
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def scored() -> Program:
    torch.manual_seed(0)
    program = trace(Net().eval(), torch.randn(1, 3, 24, 24))
    AnnotateSensitivity(criterion="magnitude-l2")(program, Context())
    return program


def test_plans_for_a_latency_on_this_host() -> None:
    program = scored()
    small = program.copy()
    outcome = PlanChannels(latency="50%", tolerance=0.1)(small, Context(dense=program))
    told = outcome.details["latency"]
    assert small.get(PLAN).predicted == {"latency_ms": told["predicted_ms"]}
    assert outcome.details["limits"]["latency_ms"] == pytest.approx(told["dense_ms"] / 2)
    assert told["measured_ms"] > 0
    assert told["table"]["entries"] > 10
    RemoveChannels()(small, Context(dense=program))
    kept = [small.tensor(f"{name}.weight").shape[0] for name in "abc"]
    assert sum(kept) < 3 * 64
    assert all(width % 4 == 0 for width in kept)


def test_a_latency_below_what_can_be_reached_says_what_stops_it() -> None:
    program = scored()
    with pytest.raises(BudgetError, match="ms, but with every group at its smallest width"):
        PlanChannels(latency="1%")(program, Context(dense=program.copy()))


def test_frozen_groups_leave_nothing_to_save() -> None:
    program = trace(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8))
    assert all(group.frozen_because for group in find_groups(program))
    program.put(SENSITIVITY, Sensitivity("test", {}))
    with pytest.raises(BudgetError, match="no unit can be removed, so no budget can be met: it "):
        PlanChannels(latency="50%")(program, Context(dense=program.copy()))


def test_the_report_states_the_prediction_beside_the_measurement() -> None:
    result = fxprune.compile(
        Net().eval(), (torch.randn(1, 3, 24, 24),), target="latency=60%,params=90%",
        pipeline="annotate-sensitivity{criterion=magnitude-l2},"
        "plan-channels{macs=99%,tolerance=0.1,corrections=0},remove-channels",
        latency_seconds=0.1, verify=False,
    )  # fmt: skip
    by_name = {entry.target.partition("=")[0]: entry for entry in result.report.targets}
    entry = by_name["latency"]
    assert entry.predicted is not None
    assert entry.value == result.report.after.latency_ms
    assert entry.met == (entry.value <= 1.05 * entry.limit)
    assert "predicted" in entry.figures
    assert by_name["params"].tolerance == 0.01
