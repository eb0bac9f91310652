"""Test budgets on several networks: each is met, or an error says why it cannot be met.

    python -m tools.budget_study [--only resnet56,vit] [--folder DATA]

Twenty budgets over six networks, some of which cannot be met. Every plan is carried out on the
graph, and the costs of the result are counted again. Scores are magnitudes of random weights or,
with ``--folder`` (a folder with the checkpoints named below), of trained weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fxprune
from examples.cifar10 import resnet
from examples.digits.model import digits_net
from fxprune.errors import BudgetError
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.models.compat import enable_torchvision
from fxprune.passes import AnnotateSensitivity, PlanChannels, RemoveChannels
from fxprune.pipeline.context import Context
from fxprune.planning.budget import Budget


def torchvision_model(name: str) -> nn.Module:
    """Make a torchvision model with random weights."""
    enable_torchvision()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name)
    return model


def vit() -> nn.Module:
    """Make a small vision transformer with random weights."""
    enable_torchvision()
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224")
    return model


@dataclass(frozen=True)
class Network:
    """A network, the shape of its input, its checkpoint if there is one, and its budgets."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    checkpoint: str | None
    budgets: tuple[str, ...]


NETWORKS = {
    "digits": Network(
        digits_net, (1, 8, 8), None, ("macs=50%", "size=100KB", "macs=50%,params=40%", "params=1%")
    ),
    "resnet20": Network(
        lambda: resnet(20), (3, 32, 32), "resnet20_cifar10.pt",
        ("macs=70%", "macs=50%", "params=3x", "macs=1%"),
    ),
    "resnet56": Network(
        lambda: resnet(56), (3, 32, 32), "resnet56_cifar10.pt",
        ("macs=50%", "macs=2.5x,size=1.2MB", "params=90%"),
    ),
    "mobilenet_v2": Network(
        lambda: torchvision_model("mobilenet_v2"), (3, 224, 224), "mobilenet_v2_imagenet.pt",
        ("macs=50%", "macs=200M", "size=5MiB"),
    ),
    "densenet121": Network(
        lambda: torchvision_model("densenet121"), (3, 224, 224), None,
        ("macs=50%", "params=25%", "macs=40%,params=60%"),
    ),
    "vit": Network(vit, (3, 224, 224), None, ("macs=50%", "macs=30%,params=45%", "size=4KB")),
}  # fmt: skip


def try_budget(program: Program, text: str) -> list[str]:
    """Plan and cut a copy; return its row of the table."""
    options = {target.name: str(target).partition("=")[2] for target in Budget.parse(text).targets}
    planner, small = PlanChannels(**options), program.copy()  # type: ignore[arg-type]
    context = Context(dense=program)
    start = time.process_time()
    try:
        planner(small, context)
    except BudgetError as error:
        return [text, "refused", f"{time.process_time() - start:.2f}", str(error)]
    seconds = time.process_time() - start
    notes = small.get(PLAN).notes
    RemoveChannels()(small, context)
    before, after = fxprune.cost(program), fxprune.cost(small)
    shares = [
        getattr(after, target.quantity) / target.limit(getattr(before, target.quantity))
        for target in planner.targets
    ]
    verdict = "met" if 0.99 <= max(shares) <= 1.01 else "MISSED"
    used = ", ".join(f"{share:.2%}" for share in shares)
    return [text, f"{verdict}: {used} of the limit", f"{seconds:.2f}", "; ".join(notes)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names of networks, separated by commas")
    parser.add_argument("--folder", type=Path, help="folder of trained weights")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(NETWORKS)
    print("| network | budget | result | planning, s | notes |\n|---|---|---|---|---|")
    for name in chosen:
        network = NETWORKS[name]
        torch.manual_seed(0)
        model = network.make().eval()
        if options.folder and network.checkpoint:
            path = options.folder / network.checkpoint
            model.load_state_dict(torch.load(path, weights_only=True))
        program = fxprune.trace(model, (torch.randn(2, *network.shape),))
        AnnotateSensitivity(criterion="magnitude-l2")(program, Context())
        for budget in network.budgets:
            print(f"| {name} | {' | '.join(try_budget(program, budget))} |", flush=True)


if __name__ == "__main__":
    main()
