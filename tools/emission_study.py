"""Time what fxprune emits beside what it emitted before and beside ONNX Runtime's own quantiser.

    python -m tools.emission_study FOLDER [--only resnet18,deit] [--label after] [--macs 50%]
                                   [--widths '{"round_to": 16}'] [--placing '{"measure": false}']
                                   [--seconds 6]

Every network gets random weights and images: only its speed means something. Files are written to
FOLDER once for each label (``LABEL-fp32.onnx``, ``LABEL-int8.onnx``; with ``--macs`` the pruned
FP32 file), so that a checkout of older code can write its own under another label. All files of a
network are then timed in turns in one run, on one thread, and a row for each is added to
``FOLDER/rows.jsonl``; ``fp32.onnx``, the first label's dense file, is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.models.compat import enable_torchvision
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    AnnotateSensitivity,
    ConvertQuantized,
    FoldBatchNorm,
    InsertObservers,
    PlanChannels,
    RemoveChannels,
    TrainQuantized,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from tools.int8_study import other_quantiser

IMAGES = 8


class UNet(nn.Module):
    """A small U-Net: three levels, transposed convolutions upwards, concatenations."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.bottom = _double(widths[-1], 8 * width)
        ups = [8 * width, *widths[:0:-1]]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, 2) for a, b in zip(ups, widths[::-1], strict=True)
        )
        self.merge = nn.ModuleList(_double(2 * b, b) for b in widths[::-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one map of logits per class."""
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


class Pitch(nn.Module):
    """Like CREPE: convolutions, each with a ReLU and only then a batch norm, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 64, 64, 64, 128, 256]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 64, stride=4 if a == 1 else 1, padding="valid" if a == 1 else "same")
            for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in widths[1:])
        self.head = nn.LazyLinear(360)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pitches."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool1d(norm(F.relu(conv(x))), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def _double(inputs: int, outputs: int) -> nn.Sequential:
    def one(a: int) -> list[nn.Module]:
        return [nn.Conv2d(a, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*one(inputs), *one(outputs))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        enable_torchvision()
        from torchvision import models

        return getattr(models, name)()  # type: ignore[no-any-return]

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        enable_torchvision()
        from timm import create_model

        return create_model(name)

    return make


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (_torchvision("resnet18"), (3, 224, 224)),
    "resnet50": (_torchvision("resnet50"), (3, 224, 224)),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), (3, 224, 224)),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), (3, 224, 224)),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), (3, 224, 224)),
    "deit": (_timm("deit_tiny_patch16_224"), (3, 224, 224)),
    "convnext": (_timm("convnext_atto"), (3, 224, 224)),
    "swin": (_timm("swin_tiny_patch4_window7_224"), (3, 224, 224)),
    "csp_silu": (_timm("cspdarknet53"), (3, 224, 224)),
    "unet": (UNet, (3, 128, 128)),
    "pitch": (Pitch, (1, 1024)),
}


def emit(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Write the files of one label that are not there yet, and the other quantiser's."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    images = torch.randn(IMAGES, *shape)
    model = make()
    with torch.no_grad():  # parameters that wait for an input; statistics of these images
        model.train()(images)
    program = fxprune.trace(model.eval(), (images[:1],))
    data = Data(Arrays(images, torch.zeros(IMAGES, dtype=torch.long)))
    context = Context(data, dense=program.copy())
    folder.mkdir(parents=True, exist_ok=True)
    if options.macs:
        path = folder / f"{options.label}-{options.macs}.onnx"
        if not path.exists():
            score, plan = AnnotateSensitivity(criterion="magnitude-l2"), PlanChannels(
                macs=options.macs, **options.widths
            )  # fmt: skip
            Pipeline((score, plan, RemoveChannels(), FoldBatchNorm())).run(program, context)
            export_onnx(program, path)
        return
    FoldBatchNorm()(program, context)
    dense, int8 = (folder / f"{options.label}-{form}.onnx" for form in ("fp32", "int8"))
    if not dense.exists():
        export_onnx(program, dense)
    if not (folder / "fp32.onnx").exists():
        (folder / "fp32.onnx").write_bytes(dense.read_bytes())
    if not int8.exists():
        _quantise(program, context, int8, options.placing)
    if not list(folder.glob("other-*.onnx")):
        other_quantiser(dense, data.calibration, IMAGES, folder, ["MinMax"])
        (folder / "ready.onnx").unlink()


def _quantise(program: Program, context: Context, path: Path, placing: dict[str, Any]) -> None:
    passes = InsertObservers(**placing), TrainQuantized(samples=IMAGES), ConvertQuantized()
    small = program.copy()
    Pipeline(passes).run(small, context)
    export_onnx(small, path)


def study(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Time all files of a network in turns; ``fp32.onnx`` comes first and is 1."""
    paths = [folder / "fp32.onnx", *sorted(set(folder.glob("*.onnx")) - {folder / "fp32.onnx"})]
    times = compare({path.stem: path for path in paths}, seconds=seconds)
    return [
        {"network": folder.name, "file": name, "ms": one.median_ms, "ratio": 1 / one.speedup,
         "p10": 1 / one.speedup_p90, "p90": 1 / one.speedup_p10}
        for name, one in times.items()
    ]  # fmt: skip


def main() -> None:
    """Write the files, time them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--label", default="now", help="name of the files written by this code")
    parser.add_argument("--macs", help="prune to this, and leave it in FP32")
    parser.add_argument("--widths", type=json.loads, default={}, help="of plan-channels, JSON")
    parser.add_argument("--placing", type=json.loads, default={}, help="of insert-observers, JSON")
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    print("| network | file | ms | FP32 = 1 | p10 to p90 |\n|---|---|---|---|---|")
    for name in options.only.split(",") if options.only else NETWORKS:
        emit(name, options.folder / name, options)
        rows = study(options.folder / name, options.seconds)
        with (options.folder / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            spread = f"{row['p10']:.3f} to {row['p90']:.3f}"
            cells = row["network"], row["file"], f"{row['ms']:.2f}", f"{row['ratio']:.3f}", spread
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
