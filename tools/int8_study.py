"""Quantise trained networks and set them beside ONNX Runtime's own quantiser.

    python -m tools.int8_study FOLDER [--only resnet20,vit] [--evaluate 1000] [--calibrate 512]
                               [--methods MinMax,Entropy,Percentile] [--epochs 0]
                               [--train 10000] [--macs 50%] [--seconds 5] [--no-depthwise]

FOLDER holds the checkpoints and data named below. Every variant of a network calibrates and is
measured on the same images, in ONNX Runtime, and all are timed in turns. The other quantiser,
``onnxruntime.quantization.quantize_static``, gets the same FP32 file after its own preprocessing,
8-bit activations, 8-bit weights per channel, and each of its calibration methods (all but MinMax
keep the activations of every image in memory).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from fxprune.compat import enable_torchvision
from fxprune.context import Context
from fxprune.data import batches
from fxprune.datasets import Samples
from fxprune.evaluate import evaluate, run_onnx, run_program
from fxprune.export import export_onnx
from fxprune.latency import compare
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
from fxprune.pipeline import Pipeline
from fxprune.program import Program
from fxprune.quantization import sums_overflow
from fxprune.quantization_onnx import inspect_fusion
from tools.study_models import CIFAR, HALF, IMAGENET, NETWORKS, Statistics, load_data, load_program

METHODS = "MinMax,Entropy,Percentile"
VIT = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Case:
    """A network: its factory, its weights, its images and how these are normalised."""

    arch: str
    argument: int | None
    weights: str
    images: str
    held_out: str | None
    statistics: Statistics = IMAGENET


CASES = {
    "resnet20": Case("arch/models_cifar.py:resnet", 20, "resnet20_cifar10.pt", *CIFAR),
    "resnet56": Case("arch/models_cifar.py:resnet", 56, "resnet56_cifar10.pt", *CIFAR),
    "mobilenet_v2": Case(
        NETWORKS["mobilenet_v2"].arch, None, "mobilenet_v2_imagenet.pt",
        "imagenet_sample1000_224.npz", None, HALF,
    ),
    "vit": Case("arch/build_timm.py:vit_cifar10_timm", None, "vit_cifar10_timm.pt", *CIFAR, VIT),
}  # fmt: skip


def load(folder: Path, case: Case, count: int) -> tuple[Program, Samples, Samples]:
    """Load a network, images to calibrate and train on, and images to measure on."""
    data: Any = load_data(folder / case.images, case.statistics)
    arch = case.arch if case.arch.startswith("torchvision") else str(folder / case.arch)
    program = load_program(arch, case.argument, folder / case.weights, data)
    known = unseen = data
    if case.held_out is None:
        order = shuffled(len(data))
        half = len(order) // 2
        known, unseen = Subset(data, order[:half]), Subset(data, order[half:][:count])
    else:
        other: Any = load_data(folder / case.held_out, case.statistics)
        unseen = Subset(other, shuffled(len(other))[:count])
    return program, known, unseen


def shuffled(count: int) -> list[int]:
    """Numbers below a count, in a fixed random order."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order


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
    program: Program, context: Context, path: Path, depthwise: bool = True, **training: Any
) -> float:
    """Quantise a folded program into a file; return its agreement with PyTorch."""
    small = program.copy()
    passes = InsertObservers(depthwise=depthwise), TrainQuantized(**training), ConvertQuantized()
    Pipeline(passes).run(small, context)
    export_onnx(small, path)
    in_torch, in_onnx = run_program(small), run_onnx(path)
    same = []
    assert context.samples.eval is not None
    for batch in batches(context.samples.eval, 64):
        with torch.no_grad():
            ours = in_torch(batch.inputs).argmax(1)
        same.append(ours == in_onnx(batch.inputs).argmax(1))
    return float(torch.cat(same).double().mean())


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The ways in which fxprune quantises, by name, with their options."""
    plain = {"samples": options.calibrate}
    found: dict[str, dict[str, Any]] = {"fxprune, calibrated": plain}
    if options.no_depthwise:
        found["fxprune, depthwise in floats"] = {**plain, "depthwise": False}
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
        for name, path in files.items():
            accuracy = evaluate(run_onnx(path), unseen).accuracy
            fusion = inspect_fusion(path)
            yield [
                name, f"{accuracy:.2%}", f"{agreement[name]:.2%}" if name in agreement else "-",
                f"{times[name].median_ms:.3f}", f"{times[name].speedup:.2f}",
                f"{path.stat().st_size / files['FP32'].stat().st_size:.1%}",
                f"{sum(fusion.fused.values())}/{len(fusion.unfused)}",
            ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--evaluate", type=int, default=1000)
    parser.add_argument("--calibrate", type=int, default=512)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--no-depthwise", action="store_true", help="try them in floats too")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--train", type=int, default=10000)
    parser.add_argument("--macs", help="prune to this first")
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    enable_torchvision()  # timm needs it, whoever imports it
    columns = [
        "network",
        "variant",
        "accuracy",
        "as PyTorch",
        "ms",
        "speed-up",
        "size",
        "fused/not",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.only.split(",") if options.only else CASES:
        for row in study(options.folder, CASES[name], options):
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
