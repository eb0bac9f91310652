"""Networks and data for the study of quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from fxprune.data.datasets import Arrays, Samples
from fxprune.graph.program import Program
from tools.study_models import IMAGENET, NETWORKS, Statistics, load_data, load_program


@dataclass(frozen=True)
class Case:
    """A network: its factory, its weights, its images and how these are normalised.

    Without weights they are random, and so are the images.
    """

    arch: str
    argument: int | tuple[int, ...] | None
    weights: str | None
    images: str | None
    held_out: str | None
    statistics: Statistics = IMAGENET


def _studied(name: str) -> Case:
    """A network that other studies have too."""
    found = NETWORKS[name]
    images = found.weights, found.images, found.held_out, found.statistics
    return Case(found.arch, found.argument, *images)


CASES = {
    **{name: _studied(name) for name in ("resnet20", "resnet56", "mobilenet_v2", "vit")},
    "llama": Case(
        "arch/models_lm.py:TinyLlama", (512, 64, 172, 4, 4, 4), "dreams231k_llama.pt",
        "dreams231k_samples.npz", None,
    ),
    "resnet18": Case("torchvision.models:resnet18", None, None, None, None),
    "resnet50": Case("torchvision.models:resnet50", None, None, None, None),
}  # fmt: skip


def load(folder: Path, case: Case, count: int) -> tuple[Program, Samples, Samples]:
    """Load a network, images to calibrate and train on, and images to measure on."""
    data: Any = noise() if case.images is None else load_data(folder / case.images, case.statistics)
    arch = case.arch if case.arch.startswith("torchvision") else str(folder / case.arch)
    weights = None if case.weights is None else folder / case.weights
    torch.manual_seed(0)
    program = load_program(arch, case.argument, weights, data)
    known = unseen = data
    if case.held_out is None:
        order = shuffled(len(data))
        half = len(order) // 2
        known, unseen = Subset(data, order[:half]), Subset(data, order[half:][:count])
    else:
        other: Any = load_data(folder / case.held_out, case.statistics)
        unseen = Subset(other, shuffled(len(other))[:count])
    return program, known, unseen


def noise(count: int = 32) -> Arrays:
    """Random images of 224 x 224, with random labels."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 224, 224, generator=random)
    return Arrays(images, torch.randint(1000, (count,), generator=random))


def shuffled(count: int) -> list[int]:
    """Numbers below a count, in a fixed random order."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order
