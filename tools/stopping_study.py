"""Measure how soon the ranking of a trace settles, compared with a ranking by many probes.

    python -m tools.stopping_study 32 --folder DATA [--samples 64] [--reference 1000]

On a ResNet for CIFAR-10: the reference takes all its probes of the outputs; then ``auto``, and
probes of the outputs until the rule stops them. Overlap is the share of the least sensitive half
that two rankings have in common. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.data.roles import Data
from fxprune.graph.facts import SENSITIVITY
from fxprune.graph.program import Program
from fxprune.passes import AnnotateSensitivity
from fxprune.pipeline.context import Context
from tools.study_models import load_data, load_program

WAYS: tuple[Mapping[str, Any], ...] = (
    {},
    {"estimator": "outputs", "batch_size": 16},
    {"estimator": "outputs", "batch_size": 64},
)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores, the processor's seconds that they took, and what the pass tells."""

    scores: Tensor
    seconds: float
    details: Mapping[str, Any]

    def lowest(self) -> set[int]:
        """The less sensitive half of the units."""
        return set(self.scores.argsort()[: len(self.scores) // 2].tolist())

    def overlap(self, other: Ranking) -> float:
        """The share of the lowest half that both have."""
        return len(self.lowest() & other.lowest()) / len(self.lowest())


def rank(program: Program, context: Context, **options: Any) -> Ranking:
    """Score a copy of the program by Hessian traces."""
    copy, start = program.copy(), time.process_time()
    AnnotateSensitivity("hessian-trace", **options)(copy, context)
    seconds = time.process_time() - start
    found = copy.get(SENSITIVITY)
    return Ranking(torch.cat(list(found.scores.values())), seconds, found.details)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int, help="20, 32 or 56")
    parser.add_argument("--folder", type=Path, required=True, help="folder of weights and images")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--reference", type=int, default=1000, help="number of probes of the reference"
    )
    options = parser.parse_args()
    data = load_data(options.folder / "cifar10_train_10k.npz")
    arch = str(options.folder / "arch/models_cifar.py:resnet")
    weights = options.folder / f"resnet{options.depth}_cifar10.pt"
    program = load_program(arch, options.depth, weights, data)
    context, many = Context(data=Data(data)), options.reference
    reference = rank(
        program, context, samples=options.samples, estimator="outputs", batch_size=16,
        probes=many, min_probes=many, tolerance=0.0,
    )  # fmt: skip
    print("| way | probes | seconds | times faster | overlap | expected wrong share |")
    print("|---|---|---|---|---|---|")
    print(f"| reference | {many} | {reference.seconds:.0f} | 1 | 1 | {_wrong(reference)} |")
    for way in WAYS:
        found = rank(program, context, samples=options.samples, probes=many, **way)
        name = ", ".join(f"{key}={value}" for key, value in way.items()) or "auto"
        print(
            f"| {name} ({found.details['method']}) | {found.details['probes']} "
            f"| {found.seconds:.1f} | {reference.seconds / found.seconds:.1f} "
            f"| {found.overlap(reference):.1%} | {_wrong(found)} |",
            flush=True,
        )


def _wrong(found: Ranking) -> str:
    share = found.details.get("wrong_share_of_cut")
    return "-" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    main()
