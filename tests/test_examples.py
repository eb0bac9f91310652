from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.cifar10 import data as cifar10_data
from examples.cifar10 import resnet
from fxprune.data.batches import batches
from fxprune.data.sources import load_data
from fxprune.errors import InputError
from fxprune.graph.serialize import load
from fxprune.models.loading import load_model

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits" / "digits.safetensors"
ARCH = "examples.digits.model:digits_net"


def run(*arguments: str) -> str:
    """Run a command of the README in the checkout."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_digits_checkpoint_is_small_and_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(ROOT)
    assert DIGITS.stat().st_size <= 300_000
    model, data = load_model(DIGITS, ARCH), load_data("digits")
    assert data.eval is not None
    (batch,) = batches(data.eval, 1000)
    with torch.no_grad():
        right = model(*batch.inputs).argmax(1) == batch.target
    assert right.float().mean() >= 0.98


def test_the_training_script_trains(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "digits.safetensors"
    printed = run("examples.digits.train", "--epochs", "3", "--out", str(out))
    assert float(printed.partition("%")[0]) >= 90
    assert out.stat().st_size == DIGITS.stat().st_size


def test_the_main_command_halves_the_digits_network(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "digits"
    asked = ("--target", "macs=50%", "--target", "params=50%", "--epochs", "25")
    given = ("--arch", ARCH, "--data", "digits", "-o", str(out))
    run("fxprune", "compile", str(DIGITS), *given, *asked)
    report = json.loads((out / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert report["target_met"]
    assert after["macs"] <= 0.505 * before["macs"]
    assert after["params"] <= 0.505 * before["params"]
    assert after["onnx_bytes"] < before["onnx_bytes"]
    assert after["accuracy"] >= before["accuracy"] - 0.01
    assert (out / "model.onnx").stat().st_size == after["onnx_bytes"]
    for name in ("zero_then_remove", "onnx_parity"):
        assert report["checks"][name]["ran"]
        assert report["checks"][name]["passed"]


def test_an_operator_of_ones_own_is_frozen_until_it_has_a_rule() -> None:
    before, after = run("examples.custom_rule").split("with a rule:")
    assert "16 units, no rule is known for operator examples.soft_clip" in before
    assert "no rule is known for operator examples.mix" in before
    assert "register one with fxprune.operator_rule" in before
    assert "16 units, removable: weight:0" in after  # the mix's outputs
    assert "16 units, removable: weight:1" in after  # and its inputs
    assert "8 of 16 channels removed, before and after the mix, exact to" in after
    assert "its weight is now (8, 8)" in after
    counted = [int(line.split()[0].replace(",", "")) for line in (before, after)
               for line in line.splitlines() if "multiply" in line]  # fmt: skip
    assert counted[1] - counted[0] == 10 * 10 * 16 * 16


def test_a_pipeline_composed_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    lines = run("examples.compose", "--out", str(tmp_path)).splitlines()
    words = {line.split()[0]: line.replace(",", "").split() for line in lines[-2:]}
    before, after = words["before:"], words["after:"]
    assert float(after[1].rstrip("%")) >= float(before[1].rstrip("%")) - 1
    assert int(after[2]) <= 0.505 * int(before[2])
    assert int(after[4]) <= 0.505 * int(before[4])
    assert (tmp_path / "model.onnx").stat().st_size < DIGITS.stat().st_size
    assert load(tmp_path / "model.pt2")(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_the_cifar10_networks_have_the_published_sizes() -> None:
    # He et al. 2016, table 6: 0.27 and 0.85 million
    sizes = [sum(p.numel() for p in resnet(depth).parameters()) for depth in (20, 56)]
    assert sizes == [269_722, 853_018]
    with pytest.raises(InputError, match="6 n"):
        resnet(21)


def test_cifar10_files_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("train_10k", "test"):
        x = random.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"cifar10_{name}.npz", x=x, y=random.integers(0, 10, 20))
    data = cifar10_data(str(tmp_path), limit=12)
    (batch,) = batches(data.calibration, 100)
    assert batch.inputs[0].shape == (12, 3, 32, 32)
    with pytest.raises(InputError, match="there is no"):
        cifar10_data(str(tmp_path / "nowhere"))
