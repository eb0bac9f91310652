"""What a quantised result is checked for: that its nodes fused, and that it predicts the same."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from fxprune.calibration.outputs import class_axis
from fxprune.calibration.running import fixed_batch
from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.report.content import Check
from fxprune.training.evaluate import Run, run_onnx, run_program

MAX_DISAGREEMENT = 0.005  # the share of predictions that may differ between the runtimes
MAX_SAMPLES = 1000


def check_quantized(program: Program, path: Path, data: Data | None) -> dict[str, Check]:
    """Check what ONNX Runtime made of a quantised program's file."""
    return {
        "int8_fused": check_fusion(path),
        "int8_agreement": check_agreement(program, path, data),
    }


def check_fusion(path: Path) -> Check:
    """Count quantised nodes that ONNX Runtime computes in floating point; none may be left."""
    fusion = inspect_fusion(path)
    done = ", ".join(f"{count} {operator}" for operator, count in fusion.fused.items())
    if not fusion.unfused:
        return Check.of(0, 0, f"fused: {done}")
    return Check.of(
        len(fusion.unfused), 0, f"not fused: {', '.join(fusion.unfused)}; fused: {done}"
    )


def check_agreement(program: Program, path: Path, data: Data | None) -> Check:
    """Compare the predictions of a program and of its ONNX file, on evaluation samples.

    A sum halfway between two INT8 values may be rounded to either, depending on the order of its
    additions. If more than ``MAX_DISAGREEMENT`` differ, the limit is the share that differs in ONNX
    Runtime with and without fused operators, plus two standard errors of the two shares.
    """
    samples = None if data is None else data.eval or data.calibration
    if samples is None:
        return Check.skipped("there is no data to compare predictions on")
    size = fixed_batch(program)
    total = min(MAX_SAMPLES, len(samples))
    total -= total % size if size else 0
    if not total:
        return Check.skipped(f"there are fewer than {size} samples to predict on")

    def predictions(run: Run) -> Tensor:
        stream = batches(samples, size or 64, seed=0, limit=total)
        with torch.no_grad():
            outputs = (run(batch.inputs) for batch in stream)
            return torch.cat([found.argmax(class_axis(found)).flatten() for found in outputs])

    ours, theirs = predictions(run_program(program)), predictions(run_onnx(path))
    found, limit = _apart(ours, theirs), max(MAX_DISAGREEMENT, 1.5 / total)
    note = f"of {total:,} predictions in both runtimes"
    if found > limit:
        noise = _apart(predictions(run_onnx(path, fused=False)), theirs)
        spread = math.sqrt((found * (1 - found) + noise * (1 - noise)) / total)
        limit = max(limit, noise + 2 * spread)
        note += f"; {noise:.1%} differ in ONNX Runtime with and without fused operators"
    return Check.of(found, limit, note)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours != theirs).double().mean())
