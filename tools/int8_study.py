"""Quantise trained networks, and compare them with ONNX Runtime's own quantiser.

    python -m tools.int8_study FOLDER [--only resnet20,vit] [--evaluate 1000] [--calibrate 512]
                               [--methods MinMax,Entropy,Percentile] [--epochs 0]
                               [--train 10000] [--macs 50%] [--seconds 5] [--no-depthwise]
                               [--measure] [--adaptive] [--attention] [--rows FILE]

Networks whose rows are in the file of ``--rows``, from the same options, are not studied again, so
that a run can be interrupted and continued. resnet18 and resnet50 have random weights and images:
only their speed means something. FOLDER holds the checkpoints and data that ``int8_cases`` names.
Every variant of a network calibrates and is measured on the same images, in ONNX Runtime, and all
are timed in turns. The other quantiser,
``onnxruntime.quantization.quantize_static``, gets the same FP32 file after its own preprocessing,
8-bit activations, 8-bit weights per channel, and each of its calibration methods (all but MinMax
keep the activations of every image in memory). The column ``error`` is the mean squared difference
of a variant's outputs from those of the FP32 file, relative to their mean square.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from fxprune.calibration.outputs import class_axis
from fxprune.cli.allocator import keep_freed_memory
from fxprune.data.batches import batches
from fxprune.data.datasets import Samples
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.onnx.quantized_nodes import inspect_fusion
from fxprune.passes import (
    AnnotateSensitivity,
    ConvertQuantized,
    FoldBatchNorm,
    InsertObservers,
    PlanChannels,
    RecalibrateNorms,
    RemoveChannels,
    TrainQuantized,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from fxprune.quantization.fake_quantizers import sums_overflow
from fxprune.training.evaluate import run_onnx, run_program
from tools.int8_cases import CASES, Case, load, shuffled

METHODS = "MinMax,Entropy,Percentile"
AGREED = 1000  # images on which PyTorch and ONNX Runtime are compared


def other_quantiser(
    path: Path, samples: Samples, count: int, folder: Path, methods: list[str]
) -> dict[str, Path]:
    """Quantise an FP32 file with ONNX Runtime's own tool, by each calibration method."""
    from onnxruntime import quantization as other
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(other.CalibrationDataReader):  # type: ignore[misc]  # it comes without types
        def __init__(self, name: str) -> None:
            self._name = name
            self._batches: Iterator[Any] = batches(samples, 32, seed=0, limit=count)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {self._name: batch.inputs[0].numpy()}

    ready = folder / "ready.onnx"
    quant_pre_process(str(path), str(ready))
    (name,) = (slot.name for slot in _inputs(path))
    written = {}
    for method in methods:
        file = folder / f"other-{method}.onnx"
        other.quantize_static(
            str(ready), str(file), Reader(name), quant_format=other.QuantFormat.QDQ,
            activation_type=other.QuantType.QUInt8, weight_type=other.QuantType.QInt8,
            per_channel=True, reduce_range=sums_overflow(),
            calibrate_method=getattr(other.CalibrationMethod, method),
        )  # fmt: skip
        written[f"quantize_static, {method}"] = file
    return written


def _inputs(path: Path) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.get_inputs())


def ours(
    program: Program, context: Context, path: Path, placing: dict[str, Any], **training: Any
) -> float:
    """Quantise a folded program into a file; return its agreement with PyTorch."""
    small = program.copy()
    passes = InsertObservers(**placing), TrainQuantized(**training), ConvertQuantized()
    Pipeline(passes).run(small, context)
    export_onnx(small, path)
    in_torch, in_onnx = run_program(small), run_onnx(path)
    same = []
    assert context.samples.eval is not None
    for batch in batches(context.samples.eval, 64, limit=AGREED):
        with torch.no_grad():
            ours, theirs = in_torch(batch.inputs), in_onnx(batch.inputs)
        axis = class_axis(ours)
        same.append((ours.argmax(axis) == theirs.argmax(axis)).flatten())
    return float(torch.cat(same).double().mean())


def outputs(path: Path, samples: Samples) -> tuple[Tensor, Tensor]:
    """What ONNX Runtime makes of samples, and their labels."""
    run = run_onnx(path, threads=1)
    pairs = [(run(batch.inputs).double(), batch.target) for batch in batches(samples, 64)]
    found, labels = zip(*pairs, strict=True)
    return torch.cat(found), torch.cat(labels)


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The ways in which fxprune quantises, by name, with their options."""
    plain: dict[str, Any] = {"samples": options.calibrate, "placing": {}}
    found: dict[str, dict[str, Any]] = {"fxprune, calibrated": plain}
    if options.no_depthwise:
        found["fxprune, depthwise in floats"] = {**plain, "placing": {"depthwise": False}}
    if options.measure:
        found["fxprune, by measured benefit"] = {**plain, "placing": {"measure": True}}
    if options.adaptive:
        found["fxprune, adaptive rounding"] = {**plain, "rounding": "adaptive"}
    if options.attention:
        found["fxprune, attention on codes"] = {**plain, "placing": {"attention": True}}
    if options.epochs:
        found[f"fxprune, {options.epochs} epochs"] = {**plain, "epochs": options.epochs}
    return found


def study(folder: Path, case: Case, options: argparse.Namespace) -> Iterator[list[str]]:
    """Quantise one network in every way; yield rows of the table."""
    program, known, unseen = load(folder, case, options.evaluate)
    train: Any = Subset(known, shuffled(len(known))[: options.train])  # type: ignore[arg-type]
    roles = {"calibration": known, "train": train, "eval": unseen}
    context = Context(roles, dense=program.copy())
    if options.macs:
        cut = AnnotateSensitivity(), PlanChannels(macs=options.macs), RemoveChannels()
        Pipeline((*cut, RecalibrateNorms())).run(program, context)
    FoldBatchNorm()(program, context)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"FP32": Path(scratch) / "fp32.onnx"}
        export_onnx(program, files["FP32"])
        files |= other_quantiser(
            files["FP32"], known, options.calibrate, Path(scratch), options.methods.split(",")
        )
        agreement: dict[str, float] = {}
        for name, given in variants(options).items():
            files[name] = Path(scratch) / f"{name}.onnx"
            agreement[name] = ours(program, context, files[name], **given)
        times = compare(files, seconds=options.seconds)
        exact, labels = outputs(files["FP32"], unseen)
        for name, path in files.items():
            found = exact if name == "FP32" else outputs(path, unseen)[0]
            accuracy = float((found.argmax(class_axis(found)) == labels).double().mean())
            error = float((found - exact).square().mean() / exact.square().mean())
            fusion = inspect_fusion(path)
            yield [
                name, f"{accuracy:.2%}", f"{error:.2e}",
                f"{agreement[name]:.2%}" if name in agreement else "-",
                f"{times[name].median_ms:.3f}", f"{times[name].speedup:.2f}",
                f"{path.stat().st_size / files['FP32'].stat().st_size:.1%}",
                f"{sum(fusion.fused.values())}/{len(fusion.unfused)}",
            ]  # fmt: skip


def main() -> None:
    """Print the table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of networks, separated by commas")
    parser.add_argument("--evaluate", type=int, default=1000)
    parser.add_argument("--calibrate", type=int, default=512)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument(
        "--no-depthwise", action="store_true", help="also test depthwise layers in FP32"
    )
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--train", type=int, default=10000)
    parser.add_argument("--measure", action="store_true", help="try opt-outs by measured benefit")
    parser.add_argument("--adaptive", action="store_true", help="also test adaptive rounding")
    parser.add_argument("--attention", action="store_true", help="also test attention in INT8")
    parser.add_argument("--rows", type=Path, help="file to read rows from and write rows to")
    parser.add_argument("--macs", help="prune to this share of MACs first")
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    columns = [
        "network",
        "variant",
        "accuracy",
        "error",
        "as PyTorch",
        "ms",
        "speed-up",
        "size",
        "fused/not",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.only.split(",") if options.only else CASES:
        for row in kept_rows(name, options):
            print(f"| {name} | {' | '.join(row)} |", flush=True)


def kept_rows(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Take a network's rows from the file, or study it and add them."""
    asked = {key: str(value) for key, value in vars(options).items() if key not in ("only", "rows")}
    file = options.rows
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        kept: dict[str, Any] = json.loads(line)
        if (kept["network"], kept["options"]) == (name, asked):
            found: list[list[str]] = kept["rows"]
            return found
    rows = list(study(options.folder, CASES[name], options))
    if file is not None:
        with file.open("a") as out:
            out.write(json.dumps({"network": name, "options": asked, "rows": rows}) + "\n")
    return rows


if __name__ == "__main__":
    main()
