from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import initializer_elements
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.passes import FoldBatchNorm, PlanChannels, RecalibrateNorms
from fxprune.pipeline.contract import Outcome
from fxprune.pipeline.progress import Tracker
from fxprune.run.checkpoint import FOLDER
from fxprune.run.compile import Result
from fxprune.run.options import Options, make_options, resolve

FILES = ["model.onnx", "model.pt2", "recipe.toml", "report.html", "report.json"]
PASSES = (
    "annotate-sensitivity{criterion=magnitude-l2},plan-channels{macs=50%},remove-channels,"
    "recalibrate-norms{samples=32},fold-batchnorm"
)


class Net(nn.Module):
    """Two stages with a residual, batch norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def data() -> dict[str, Any]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(96, 3, 8, 8, generator=random)
    y = torch.randint(4, (96,), generator=random)
    return {"train": (x[:64], y[:64]), "eval": (x[64:], y[64:])}


def compiled(out: Path | None, **options: Any) -> Result:
    given: dict[str, Any] = {"pipeline": PASSES, "data": data(), "latency_seconds": 0.05}
    given |= {"progress": Tracker(False), "out": out, **options}
    return fxprune.compile(net(), **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run") / "out"
    return compiled(out), out


def test_the_result_is_smaller_in_its_shapes(run: tuple[Result, Path]) -> None:
    result, out = run
    report = json.loads((out / "report.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert list(result.files) == FILES
    assert report["after"]["macs"] <= 0.505 * report["before"]["macs"]
    assert report["target"] == "macs=50%"
    assert report["target_met"] is True
    assert initializer_elements(out / "model.onnx") < report["before"]["params"]
    assert report["after"]["onnx_bytes"] == (out / "model.onnx").stat().st_size
    for figures in (report["before"], report["after"]):
        assert all(value is not None for value in figures.values())
    assert all(check["ran"] and check["passed"] for check in report["checks"].values())
    assert sum(group["removed"] for group in report["groups"]) == report["passes"][2]["changes"]
    assert report["sensitivity"].keys() <= {group["name"] for group in report["groups"]}


def test_the_saved_program_is_the_result(run: tuple[Result, Path]) -> None:
    result, out = run
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(fxprune.load(out / "model.pt2")(x), result.program(x))


def test_the_model_is_left_as_it_was() -> None:
    model = net().train()
    state = copy.deepcopy(model.state_dict())
    fxprune.compile(model, data=data(), pipeline="recalibrate-norms", latency_seconds=0.01)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_same_run_gives_the_same_bytes(run: tuple[Result, Path], tmp_path: Path) -> None:
    torch.manual_seed(77)
    compiled(tmp_path)
    for name in ("model.onnx", "model.pt2", "recipe.toml"):
        assert (tmp_path / name).read_bytes() == (run[1] / name).read_bytes(), name


def test_a_killed_run_resumes(
    run: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Outcome:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecalibrateNorms, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compiled(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    with monkeypatch.context() as patch:
        patch.setattr(PlanChannels, "run", interrupt)  # is behind it already
        result = compiled(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert (tmp_path / "model.onnx").read_bytes() == (run[1] / "model.onnx").read_bytes()
    assert [group.removed for group in result.report.groups] == [
        group.removed for group in run[0].report.groups
    ]


def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Outcome:
        raise InputError("enough")

    monkeypatch.setattr(FoldBatchNorm, "run", fail)
    with pytest.raises(InputError, match="enough"):
        compiled(tmp_path)
    with pytest.raises(InputError, match=r"belongs to another run.*without --resume"):
        compiled(tmp_path, resume=True, seed=1)
    with pytest.raises(InputError, match="the finished passes have changed"):
        compiled(tmp_path, resume=True, pipeline="recalibrate-norms")
    state = tmp_path / FOLDER / "state.json"
    state.write_text(state.read_text()[:-20])
    with pytest.raises(InputError, match="is damaged"):
        compiled(tmp_path, resume=True)


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label 9"):
        compiled(tmp_path / "out", data=(torch.randn(8, 3, 8, 8), torch.full((8,), 9)))
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_met_is_not_ok() -> None:
    result = compiled(None, pipeline="fold-batchnorm", target="macs=50%", verify=False)
    assert result.report.target_met is False
    assert not result.report.ok
    assert result.files == {}
    assert result.report.checks["zero_then_remove"].ran is False


def test_a_drop_beyond_the_limit_is_not_ok() -> None:
    report = compiled(None, data={"calibration": data()["train"][0]}, max_drop=1e-9).report
    check = report.checks["max_drop"]
    assert check.ran
    assert check.value is not None
    assert check.passed == (check.value <= 1e-9)
    assert "the data has no labels: accuracy is the agreement with the dense model" in report.notes
    assert report.before.accuracy == 1.0


def test_a_drop_alone_searches_for_the_smallest_model() -> None:
    steps = PASSES.replace("{macs=50%}", "")
    report = compiled(None, pipeline=steps, max_drop=100.0, verify=False).report
    assert len(report.trials) > 1
    tightest = min((trial for trial in report.trials if trial.fits), key=lambda t: t.share)
    assert [entry.target for entry in report.targets] == [tightest.target]
    assert report.after.macs == tightest.macs
    assert report.after.accuracy == tightest.accuracy
    assert report.checks["max_drop"].passed
    assert report.content()["trials"][0]["target"] == "macs=50%"


def test_without_data_accuracy_is_unknown() -> None:
    steps = "annotate-sensitivity{criterion=magnitude-l2},plan-channels{macs=50%},remove-channels"
    inputs = (torch.randn(1, 3, 8, 8),)
    report = compiled(None, data=None, example_inputs=inputs, pipeline=steps).report
    assert report.after.accuracy is None
    assert report.checks["onnx_accuracy"].ran is False
    assert report.target_met


def test_there_must_be_something_to_trace_with() -> None:
    with pytest.raises(InputError, match="cannot infer the input shape"):
        compiled(None, data=None)


def test_targets_go_into_the_last_plan() -> None:
    pipeline, targets = resolve(make_options("params=25%,macs=2x", PASSES))
    assert list(map(str, targets)) == ["params=25%", "macs=50%"]
    planner = pipeline.passes[1]
    assert isinstance(planner, PlanChannels)
    assert (planner.macs, planner.params) == ("50%", "25%")


def test_without_targets_those_of_the_plan_count() -> None:
    assert list(map(str, resolve(make_options(None, PASSES))[1])) == ["macs=50%"]
    assert resolve(Options())[1] == ()  # those are searched for
    assert resolve(Options(max_drop=1.0))[1] == ()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "macs=50%,macs=30%"}, "limits macs twice"),
        ({"pipeline": PASSES, "epochs": 3}, r"write finetune\{epochs=...\}"),
        ({"epochs": -1}, "epochs is -1; it must be at least 0"),
        ({"device": "tuba"}, "the device 'tuba' cannot be used"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve(make_options(**options))


@pytest.mark.parametrize("max_drop", [None, 99.0])
def test_much_lost_accuracy_gets_a_word_unless_it_was_allowed(max_drop: float | None) -> None:
    x = data()["train"][0]  # unlabelled: what the dense model says is right
    report = compiled(None, data={"train": x, "eval": x}, max_drop=max_drop).report
    assert report.before.accuracy is not None
    assert report.after.accuracy is not None
    lost = 100 * (report.before.accuracy - report.after.accuracy)
    assert lost > 5
    told = [
        note
        for note in report.notes
        if note.startswith(f"accuracy fell by {lost:.1f} percentage points")
    ]
    assert len(told) == (max_drop is None)


def test_groups_that_go_with_their_block_are_told_as_removed() -> None:
    report = compiled(None, pipeline="remove-blocks{macs=60%,samples=16},recalibrate-norms").report
    assert report.entries[0].outcome.changes == 1
    removed = {group.name: (group.removed, group.units) for group in report.groups}
    assert removed["conv1.weight:0"] == (32, 32)
    assert removed["stem.weight:0"] == (0, 16)
    assert report.ok
