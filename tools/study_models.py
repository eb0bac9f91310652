"""Trained networks and images for the studies."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fxprune import trace
from fxprune.data.datasets import Arrays
from fxprune.graph.program import Program
from fxprune.models.compat import enable_torchvision

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VIT = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Network:
    """A trained network, its data, and how much of it the study can afford.

    Attributes:
        arch: the factory, and its argument.
        argument: what the factory is called with.
        weights: file with the state dict.
        images: file with the images to calibrate on.
        held_out: file with the images to measure on; None takes half of ``images``.
        samples: calibration images.
        units: units that are removed one at a time.
        truth: images for that.
        evaluated: images for the accuracy after removal.
        probes: at most, for traces.
        targets: shares of multiply-accumulates that remain.
        statistics: means and deviations that images are normalised by.

    """

    arch: str
    argument: int | None
    weights: str
    images: str
    held_out: str | None
    samples: int
    units: int
    truth: int
    evaluated: int
    probes: int
    targets: tuple[str, ...]
    statistics: Statistics = IMAGENET


CIFAR = ("cifar10_train_10k.npz", "cifar10_test.npz")
NETWORKS = {
    "resnet20": Network(
        "arch/models_cifar.py:resnet", 20, "resnet20_cifar10.pt", *CIFAR,
        256, 150, 300, 1000, 300, ("70%", "50%"),
    ),
    "resnet56": Network(
        "arch/models_cifar.py:resnet", 56, "resnet56_cifar10.pt", *CIFAR,
        128, 100, 200, 500, 300, ("50%",),
    ),
    "mobilenet_v2": Network(
        "torchvision.models:mobilenet_v2", None, "mobilenet_v2_imagenet.pt",
        "imagenet_sample1000_224.npz", None, 32, 40, 100, 250, 16, ("85%",), HALF,
    ),
    "vit": Network(
        "arch/build_timm.py:vit_cifar10_timm", None, "vit_cifar10_timm.pt", *CIFAR,
        256, 100, 200, 1000, 300, ("70%",), VIT,
    ),
}  # fmt: skip


def study_options(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every study of networks has."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else None)
    parser.add_argument("network", nargs="?", choices=sorted(NETWORKS))
    parser.add_argument("--folder", type=Path, help="folder of weights and images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the results")
    return parser


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation of shares, in percent."""
    if not values:
        return "-"
    shown = f"{100 * float(np.mean(values)):.{digits}f}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {100 * float(np.std(values, ddof=1)):.{digits}f}"


def load_data(path: Path, statistics: Statistics = IMAGENET) -> Arrays:
    """Read an ``.npz``: ``x`` and ``y``, or ``jpeg``, ``offsets`` and ``labels``, or ``ids``."""
    with np.load(path) as file:
        if "ids" in file:  # tokens; each is to be told from those before it
            tokens = torch.from_numpy(file["ids"].astype(np.int64))
            return Arrays(tokens[:, :-1], tokens[:, 1:])
        if "x" in file:
            images, labels = file["x"], file["y"]
        else:
            images, labels = _decoded(file["jpeg"], file["offsets"]), file["labels"]
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)

    def normalised(stack: Tensor) -> Tensor:
        return (stack.permute(0, 3, 1, 2).float() / 255 - mean) / deviation

    return Arrays(torch.from_numpy(images), torch.from_numpy(labels).long(), normalised)


def _decoded(data: Any, offsets: Any) -> Any:
    ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB")) for a, b in ends]
    )


def load_program(
    arch: str, argument: int | tuple[int, ...] | None, weights: Path | None, data: Arrays
) -> Program:
    """Build a model by its factory, load a state dict if any, and trace it for two samples."""
    place, _, name = arch.rpartition(":")
    factory = cast(Callable[..., nn.Module], getattr(_module(place), name))
    arguments = () if argument is None else argument if isinstance(argument, tuple) else (argument,)
    model = factory(*arguments)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return trace(model.eval(), (data.gather(torch.arange(2))[0],))


def _module(place: str) -> Any:
    enable_torchvision()  # timm needs it, whoever imports it
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
