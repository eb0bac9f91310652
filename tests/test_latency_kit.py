from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.latency.cache import FORMAT, Host, Timing
from fxprune.latency.kit import KitSamples, write_kit
from fxprune.latency.machine import Neighbours
from fxprune.latency.table import Table
from fxprune.latency.terms import configs_of
from fxprune.onnx.export import export_onnx
from fxprune.passes import AnnotateSensitivity, PlanChannels
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        y: Tensor = self.out(x.mean((2, 3)))
        return y


def program() -> Program:
    return fxprune.trace(Net().eval(), (torch.randn(1, 3, 12, 12),))


def samples() -> tuple[Tensor, Tensor]:
    return torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(
        40
    ) % 4


def run(kit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a kit in a process that can import neither PyTorch nor the installed fxprune."""
    block = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['onnx'] = None\n"
        f"sys.argv = {[str(kit), *arguments]!r}\n"
        f"sys.path.insert(0, {str(kit)!r})\n"
        f"runpy.run_path({str(kit)!r}, run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", block], cwd=kit.parent, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kit") / "kit.zip"
    net, (x, y) = program(), samples()
    right = float((net(x).argmax(1) == y).double().mean())
    assert write_kit(net, path, KitSamples((x,), y, "labels of the data", right)) > 50
    return path


@pytest.fixture(scope="module")
def table(kit: Path) -> Path:
    done = run(kit, "times", "-o", "table.json")
    assert done.returncode == 0, done.stderr
    return kit.parent / "table.json"


def test_times_every_operator_of_the_kit(kit: Path, table: Path) -> None:
    with zipfile.ZipFile(kit) as opened:
        asked = {key for part in json.loads(opened.read("kit.json"))["sessions"] for key in part}
    content = json.loads(table.read_text())
    assert content["times"].keys() == asked
    assert content["host"]["cpu"] == Host.here(1).cpu
    assert content["dense_ms"] > 0
    assert content["operators"].keys() >= {"Conv"} or content["operators"].keys() >= {"FusedConv"}


def test_judges_latency_and_accuracy_there(kit: Path, tmp_path: Path) -> None:
    net, (x, y) = program(), samples()
    with torch.no_grad():
        net.graph_module.get_parameter("out.weight").neg_()  # another accuracy than the dense one
    export_onnx(net, tmp_path / "model.onnx")
    figures = tmp_path / "figures.json"
    done = run(kit, "judge", str(tmp_path / "model.onnx"), "-o", str(figures))
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["model"]["accuracy"] == float((net(x).argmax(1) == y).double().mean())
    assert found["dense"]["accuracy"] == found["dense_accuracy"] != found["model"]["accuracy"]
    assert found["model"]["median_ms"] > 0
    assert found["samples"] == 40


def test_bad_input_is_one_line(kit: Path) -> None:
    done = run(kit, "times", "--provider", "NoSuchProvider")
    assert done.returncode == 2
    assert "CPUExecutionProvider" in done.stderr
    assert run(kit, "judge", "missing.onnx").returncode == 2


def planned(table: Path, limit: str) -> dict[str, tuple[int, ...]]:
    net, context = program(), Context(samples_of(), latency_table=table)
    Pipeline([AnnotateSensitivity(), PlanChannels(latency=limit)]).run(net, context)
    return dict(net.get(fxprune.graph.facts.PLAN).remove)


def samples_of() -> Any:
    return samples()


def changed(table: Path, path: Path, part: str, factor: float) -> Path:
    content = json.loads(table.read_text())
    for key, row in content["times"].items():
        if part in key:
            row[0] *= factor
    path.write_text(json.dumps(content))
    return path


def test_the_same_table_gives_the_same_plan_and_a_slow_layer_another(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("another machine's times are not measured here")

    monkeypatch.setattr("fxprune.latency.table.measure", refused)
    monkeypatch.setattr("fxprune.latency.bench.compare", refused)
    first = planned(table, "70%")
    assert sum(map(len, first.values())) > 0
    assert planned(table, "70%") == first
    content = json.loads(table.read_text())
    for key, row in content["times"].items():  # only the linear layer takes time, by its inputs
        row[0] = json.loads(key.rpartition(" ")[2])[1] if key.startswith("fp32 linear") else 1e-6
    content["operators"] = {"Gemm": 1000.0}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    plan = planned(other, "50%")
    assert {name: len(units) for name, units in plan.items()} == {"second.weight:0": 16}
    assert plan != first


def test_search_plans_for_the_machine_and_the_report_names_it(table: Path, tmp_path: Path) -> None:
    path = changed(table, tmp_path / "pi.json", "nothing", 1.0)
    content = json.loads(path.read_text())
    content["host"]["cpu"] = "Cortex-A76"
    path.write_text(json.dumps(content))
    x, y = samples()
    result = fxprune.compile(
        Net().eval(), data={"calibration": (x, y), "eval": (x, y)}, target="latency=80%",
        latency_table=path, int8=False, search_minutes=0.5, latency_seconds=0.1,
    )  # fmt: skip
    assert any("Cortex-A76" in note for note in result.report.notes)
    (target,) = result.report.targets
    assert target.limit == pytest.approx(0.8 * content["dense_ms"])
    assert target.predicted == target.value
    assert target.value <= 1.05 * target.limit


def test_what_the_table_lacks_is_named_and_not_measured(table: Path) -> None:
    other = fxprune.trace(nn.Conv1d(3, 4, 5), (torch.randn(1, 3, 9),))
    opened = Table.of(Context(latency_table=table))
    with pytest.raises(InputError, match=r"no time for fp32 conv .*make the kit again"):
        opened.fill(configs_of(other))
    with pytest.raises(InputError, match="cannot read"):
        Table.of(Context(latency_table=table.with_name("missing.json")))


def test_a_width_between_two_takes_time_between_theirs() -> None:
    times = {
        f"fp32 conv [3] [{a},{b},{a}]": Timing(float(a * b), 0.0, 0.0)
        for a in (8, 16) for b in (8, 16)
    }  # fmt: skip
    between = Neighbours(times)
    found = between.timing("fp32 conv [3] [16,12,16]")
    assert found is not None
    assert found.us == pytest.approx(16 * 12)
    smallest = between.timing("fp32 conv [3] [4,4,4]")
    assert smallest is not None
    assert smallest.us == 64
    assert between.timing("fp32 conv [3] [17,8,17]") is None
    assert between.timing("int8 conv [3] [8,8,8]") is None


def test_the_table_of_the_kit_has_the_format_of_the_cache(table: Path) -> None:
    content = json.loads(table.read_text())
    assert content["format"] == FORMAT
    assert np.isfinite([row[0] for row in content["times"].values()]).all()
