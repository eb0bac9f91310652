"""What a quantised result is checked for: that its nodes fused, and that it predicts the same."""

from __future__ import annotations

from pathlib import Path

import torch

from fxprune.data import Data, batches
from fxprune.graph.program import Program
from fxprune.quantization.onnx_nodes import inspect_fusion
from fxprune.report.content import Check
from fxprune.training.evaluate import class_axis, fixed_batch, run_onnx, run_program

DISAGREEMENT = 0.005  # the share of predictions that may differ between the runtimes
SAMPLES = 1000


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
    """Compare the predictions of a program and of its ONNX file, on evaluation samples."""
    samples = None if data is None else data.eval or data.calibration
    if samples is None:
        return Check.skipped("there is no data to predict on")
    size = fixed_batch(program)
    total = min(SAMPLES, len(samples))
    total -= total % size if size else 0
    in_torch, in_onnx = run_program(program), run_onnx(path)
    same = []
    for batch in batches(samples, size or 64, seed=0, limit=total):
        with torch.no_grad():
            ours, theirs = in_torch(batch.inputs), in_onnx(batch.inputs)
        axis = class_axis(ours)
        same.append((ours.argmax(axis) == theirs.argmax(axis)).flatten())
    if not same:
        return Check.skipped(f"there are fewer than {size} samples to predict on")
    agreement = torch.cat(same).double().mean()
    limit = max(DISAGREEMENT, 1.5 / total)
    return Check.of(float(1 - agreement), limit, f"of {total:,} predictions in both runtimes")
