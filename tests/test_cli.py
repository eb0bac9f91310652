from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fxprune.cli.commands import app
from fxprune.passes import ALL, RecalibrateNorms
from fxprune.pipeline.contract import Outcome

FACTORY = """
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3),
    )
"""
QUICK = "annotate-sensitivity{criterion=magnitude-l2},plan-channels{macs=50%},remove-channels"
ARCH = ["--arch", "factory_for_cli:net"]
Call = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a factory, its weights, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_for_cli.py").write_text(FACTORY)
    sys.modules.pop("factory_for_cli", None)
    scope: dict[str, Any] = {}
    exec(FACTORY, scope)
    torch.manual_seed(0)
    torch.save(scope["net"]().state_dict(), "net.pt")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 1, 8, 8)).astype(np.float32), random.integers(3, size=40)
    np.savez("data.npz", x=x, y=y)
    np.savez("small.npz", x=x[..., :5], y=y)
    np.savez("labels.npz", x=x, y=y + 1)
    torch.save(nn.Linear(2, 2), "pickled.pt")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    Path("broken.pt").write_bytes(Path("net.pt").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    Path("consent.toml").write_text("[run]\ntrust-pickle = true\n")
    Path("seed.toml").write_text("[run]\nseed = 'one'\n")
    Path("bad.toml").write_text("[[pass]]\nname = 'remove-channel'\n")
    return tmp_path


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_compiles_and_the_recipe_reproduces_it(folder: Path) -> None:
    run = call(
        "compile", "net.pt", *ARCH, "--data", "data.npz", "--passes", QUICK, "--target",
        "params=60%", "--seed", "3", "-o", "out",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "target params=60%" in run.stdout
    assert "wrote model.onnx, model.pt2, recipe.toml, report.html, report.json in out" in run.stdout
    report = json.loads(Path("out/report.json").read_text())
    assert report["after"]["params"] <= 0.606 * report["before"]["params"]
    again = call("compile", "--recipe", "out/recipe.toml", "-o", "again", "--quiet")
    assert again.exit_code == 0, again.output
    assert again.output == ""
    for name in ("model.onnx", "recipe.toml"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


def test_a_target_not_met_is_exit_code_1(folder: Path) -> None:
    run = call(
        "compile", "net.pt", *ARCH, "--data", "data.npz", "--passes", "fold-batchnorm",
        "--target", "macs=50%", "--no-verify", "-o", "out",
    )  # fmt: skip
    assert run.exit_code == 1
    assert "NOT MET" in run.stdout, run.output
    assert "zero_then_remove: not run (--no-verify was given)" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ("no.pt --data data.npz", 2, "there is no file no.pt"),
        ("broken.pt --data data.npz", 2, "truncated"),
        ("pickled.pt --data data.npz", 2, "--trust-pickle"),
        ("other.pt --data data.npz", 2, "missing from the file: 0.weight"),
        ("net.pt --data small.npz", 2, "mat1 and mat2|cannot capture|takes"),
        ("net.pt --data small.npz --input-shape 1,8,8", 2, "samples are 1x8x5, but .* 1x8x8"),
        ("net.pt --data empty", 2, "holds no images"),
        ("net.pt --data labels.npz", 2, "the label 3, but the model's 3 outputs"),
        ("net.pt --data nowhere", 2, "there is no such folder"),
        ("net.pt --data data.npz --input-shape 1,a", 2, "--input-shape 1,a: write numbers"),
        ("net.pt --data data.npz --target mac=1", 2, "'mac' is not a target"),
        ("net.pt --data data.npz --passes fold-batchnorms", 2, "did you mean fold-batchnorm"),
        ("net.pt --data data.npz --passes remove-channels", 2, "reads 'plan', and no earlier pass"),
        ("net.pt --data data.npz --recipe bad.toml", 2, "did you mean remove-channels"),
        ("pickled.pt --data data.npz --recipe consent.toml", 2, "cannot set 'trust-pickle'"),
        ("net.pt --data data.npz --recipe seed.toml", 2, "'seed': expected a whole number"),
        ("net.pt --data data.npz --max-drop -1", 2, "max-drop is -1.0; it must be at least 0"),
        ("net.pt --data data.npz --recipe no.toml", 2, "cannot read --recipe no.toml"),
        ("net.pt --data data.npz --arch-option width", 2, "--arch-option width: write name=value"),
        ("net.pt --data data.npz --device tuba", 2, "the device 'tuba' cannot be used"),
        ("--data data.npz", 2, "no model is given"),
        ("net.pt", 2, "cannot infer the input shape"),
        ("net.pt --data data.npz -o net.pt/out", 2, "cannot write into the output folder"),
    ],
)
def test_bad_input_is_one_paragraph(folder: Path, arguments: str, code: int, reason: str) -> None:
    output = () if "-o" in arguments else ("-o", "out")
    run = call("compile", *arguments.split(), *ARCH, *output)
    assert run.exit_code == code, run.output
    assert not run.stdout
    assert run.stderr.startswith("fxprune: ")
    assert "Traceback" not in run.stderr
    assert re.search(reason, run.stderr), run.stderr
    assert not Path("out").exists()


def test_a_target_that_cannot_be_met_says_what_stops_it(folder: Path) -> None:
    steps = f"{QUICK},recalibrate-norms"
    arguments = ["compile", "net.pt", *ARCH, "--data", "data.npz", "--passes", steps, "-o", "out"]
    run = call(*arguments, "--target", "macs=0.01%", "--no-verify")
    assert run.exit_code == 1
    assert "in plan-channels" in run.stderr
    assert "finished passes are kept; run again with --resume" in run.stderr
    assert [path.name for path in Path("out").iterdir()] == [".fxprune-checkpoint"]
    again = call(*arguments, "--target", "macs=60%", "--resume", "--no-verify")
    assert again.exit_code == 0, again.output


def test_unknown_options_are_exit_code_2() -> None:
    assert call("compile", "--colour").exit_code == 2


def test_an_unexpected_error_names_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Outcome:
        raise ZeroDivisionError("by zero\nmore")

    monkeypatch.setattr(RecalibrateNorms, "run", fail)
    arguments = ("compile", "net.pt", *ARCH, "--data", "data.npz", "--passes", "recalibrate-norms")
    run = call(*arguments, "--no-verify", "-o", "out")
    assert run.exit_code == 1
    expected = (
        "fxprune: unexpected ZeroDivisionError: by zero\n  in recalibrate-norms, after nothing\n"
    )
    assert expected in run.stderr
    assert "Traceback" in call(*arguments, "--no-verify", "--debug", "-o", "out").stderr


def test_ctrl_c_in_the_middle_leaves_nothing_half_written(folder: Path) -> None:
    command = [sys.executable, "-m", "fxprune", "compile", "net.pt", *ARCH, "--data", "data.npz"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--passes", "recalibrate-norms,finetune{epochs=100000000}", "-o", "out"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Who runs the tests in the background has them ignore this signal.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    kept = folder / "out" / ".fxprune-checkpoint" / "state.json"
    deadline = time.monotonic() + 600
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    note, reason = err.splitlines()
    assert not out
    assert note.startswith("note: no evaluation data")
    assert reason.startswith("fxprune: interrupted")
    assert [path.name for path in (folder / "out").iterdir()] == [".fxprune-checkpoint"]


def test_inspect_lists_groups(folder: Path) -> None:
    run = call("inspect", "net.pt", *ARCH, "--input-shape", "1,8,8", "--json")
    found = json.loads(run.stdout)
    assert found["params"] == sum(tensor.numel() for tensor in parameters())
    free = [group for group in found["groups"] if group["frozen_because"] is None]
    assert [group["units"] for group in free] == [16, 16]
    assert 0 < free[0]["macs_share"] <= 1
    table = call("inspect", "net.pt", *ARCH, "--data", "data.npz").stdout
    assert "2 groups can shrink" in table
    assert "it is an output of the model" in " ".join(table.split())


def test_inspect_draws_the_graph(folder: Path) -> None:
    arguments = ("inspect", "net.pt", *ARCH, "--input-shape", "1,8,8", "--html")
    assert call(*arguments, "drawn/net.html").exit_code == 0
    assert (folder / "drawn" / "net.html").read_text().startswith("<!doctype html>")
    run = call(*arguments, "net.pt/net.html")
    assert run.exit_code == 2
    assert "cannot write into the output folder net.pt" in run.stderr


def parameters() -> list[torch.Tensor]:
    state = torch.load("net.pt", weights_only=True)
    return [value for name, value in state.items() if not name.endswith(BUFFERS)]


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def test_inspect_needs_a_shape(folder: Path) -> None:
    run = call("inspect", "net.pt", *ARCH)
    assert run.exit_code == 2
    assert "--input-shape 3,224,224 or --data" in run.stderr


def test_passes_lists_options_and_facts() -> None:
    listed = {item["name"]: item for item in json.loads(call("passes", "--json").stdout)}
    assert set(listed) >= {step.name for step in ALL}
    assert listed["plan-channels"]["needs"] == ["sensitivity"]
    assert all(option["meaning"] for item in listed.values() for option in item["options"].values())
    text = " ".join(call("passes", "plan-channels").stdout.split())
    assert "plan-channels needs sensitivity; gives plan" in text
    assert "max-ratio=0.9" in text
    assert call("passes", "plan").exit_code == 2


def test_bench_times_files(folder: Path) -> None:
    from fxprune import export_onnx, trace

    model = nn.Linear(3, 2)
    export_onnx(trace(model, (torch.zeros(1, 3),)), "a.onnx")
    run = call("bench", "a.onnx", "a.onnx", "--seconds", "0.01", "--json")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["a.onnx"]["median_ms"] > 0
    assert "median ms" in call("bench", "a.onnx", "--seconds", "0.01").stdout
    missing = call("bench", "b.onnx")
    assert (missing.exit_code, missing.stderr) == (
        2,
        "fxprune: there is no file b.onnx; give the path of an ONNX model\n",
    )
