"""Compile a model of a library with the command itself: default pipeline, photos of mixed sizes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from fxprune.cli.commands import app
from fxprune.cli.request import Request
from fxprune.data.batches import batches
from fxprune.models.loading import build
from fxprune.models.preprocessing import preprocessing_of
from tools.coverage_models import enliven

Record = dict[str, Any]
SIZES = (64, 96, 128)  # the smallest that a model runs on, else its own
TARGET = "macs=60%"


def examine_compile(
    suite: str, name: str, count: int, told: Callable[[Record], None], target: str = TARGET
) -> Record:
    """Compile a model with random weights for photos made up on the spot.

    Args:
        suite: ``torchvision`` or ``timm``.
        name: the model.
        count: how many photos.
        told: is called with what is known after every step.
        target: the budget.

    Returns:
        ``compile`` (None if it fails), ``compile_why`` and the figures of the report.

    """
    record: Record = {"compile": None, "compile_why": None}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            told({"compile_step": "build"})
            make_photos(folder / "photos", count)
            arch = f"{suite}:{name}"
            options = small_input(arch)
            save_weights(arch, options, folder)
            told({"compile_step": "compile"})
            record |= run_command(arch, options, folder, target)
        except Exception as error:
            record["compile_why"] = f"{type(error).__name__}: {error}"
    return {**record, "compile_step": "done"}


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write JPEG files of mixed sizes in two classes: coloured ramps, one of them with stripes."""
    random = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(size) for size in random.integers(90, 200, 2))
        across = np.linspace(0, 1, width)[None, :, None] * random.uniform(40, 160, 3)
        down = np.linspace(0, 1, height)[:, None, None] * random.uniform(0, 60, 3)
        stripes = 30 * np.sin(np.arange(width) / 4)[None, :, None] * (number % 2)
        noise = random.normal(0, 8, (height, width, 3))
        pixels = (across + down + stripes + noise + 20).clip(0, 255).astype(np.uint8)
        path = folder / ("plain", "striped")[number % 2] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def small_input(arch: str) -> list[str]:
    """Return the command's options for the smallest input that a model runs on."""
    known = preprocessing_of(arch, {})
    own = known.size[0] if known else 224
    for size in (size for size in SIZES if size < own):
        names = (None, "img_size") if arch.startswith("timm") else (None, "image_size")
        for option in names:
            given = {} if option is None else {option: size}
            if _runs(arch, given, size):
                found = ["--image-size", str(size)]
                return found + [
                    part for key in given for part in ("--arch-option", f"{key}={size}")
                ]
    return []


def _runs(arch: str, options: dict[str, int], size: int) -> bool:
    """Whether a model can be made, and run on an input size, which computes nothing."""
    try:
        model = build(arch, options).eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(torch.zeros(2, 3, size, size))
    except Exception:  # whatever a library raises says no
        return False
    return True


def save_weights(arch: str, options: list[str], folder: Path) -> None:
    """Save random weights that matter, with batch norms that know what passes through them."""
    torch.manual_seed(0)
    given = [options[n + 1] for n, part in enumerate(options) if part == "--arch-option"]
    model = enliven(
        build(arch, {key: int(size) for key, size in (one.split("=") for one in given)})
    )
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    torch.save(model.state_dict(), folder / "weights.pt")
    size = options[1] if options else None
    request = Request(
        str(folder / "weights.pt"), arch, data=str(folder / "photos"), image_size=size
    )
    data = request.load_data(0)
    assert data is not None
    with torch.no_grad():
        model(*next(batches(data.calibration, 32, seed=0)).inputs)
    torch.save(model.state_dict(), folder / "weights.pt")


def run_command(arch: str, options: list[str], folder: Path, target: str) -> Record:
    """Run ``fxprune compile`` and read its report."""
    command = [
        "compile", str(folder / "weights.pt"), "--arch", arch, "--data", str(folder / "photos"),
        "--target", target, "--threads", "1", "-o", str(folder / "out"), *options,
    ]  # fmt: skip
    run = CliRunner().invoke(app, command)
    said = run.stderr.strip().splitlines()
    lines = [line for line in said if not line.startswith("note: ")]
    report = folder / "out" / "report.json"
    if not report.exists():
        why = " ".join(lines) or repr(run.exception)
        return {"compile_why": why}
    found = json.loads(report.read_text())
    failed = list(_failed(found))
    kept = (found.get("precision") or {}).get("kept", "fp32")
    macs = found["after"]["macs"] / found["before"]["macs"]
    if run.exit_code or failed:
        return {"compile_why": "; ".join(failed) or " ".join(lines), "compile_macs": macs}
    return {"compile": kept, "compile_macs": macs, "compile_input": options[1] if options else None}


def _failed(report: Any) -> Iterator[str]:
    for name, check in report["checks"].items():
        if check["passed"] is False:
            yield f"check {name}: {check['value']} (at most {check['limit']}) {check['note'] or ''}"
    for target in report["targets"]:
        if not target["met"]:
            yield f"target {target['target']}: {target['value']} of {target['limit']}"
