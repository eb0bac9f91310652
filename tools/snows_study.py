"""Measure how much accuracy reconstruction recovers, with masks and after removal.

    python -m tools.snows_study resnet20 --folder DATA --out DIR     # resumable, piece by piece
    python -m tools.snows_study --out DIR --table                    # print the results

Per network and task: the accuracy on held-out images before recovery, with batch norms
recalibrated, with layers re-fitted by least squares, and with a lookahead; with masks, also for the
settings of arXiv 2411.18376, with and without batch norms recalibrated afterwards. All methods use
the same draws of the calibration images. No labels are used. Every figure is a file in the output
folder, and existing files are not measured again. The paper's settings take longest, and are
measured a few layers at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from fxprune import cost
from fxprune.cli.allocator import keep_freed_memory
from fxprune.graph.facts import MASKS as MASKED
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.passes import (
    AnnotateSensitivity,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
    Sparsify,
)
from fxprune.pipeline.context import Context
from tools.rank_study import Study
from tools.study_models import NETWORKS, percent, study_options

# Masks are on all layers but the first and the last.
MASKS = {
    "1:4": {"pattern": "1:4"},
    "2:4": {"pattern": "2:4"},
    "unstructured 70%": {"pattern": "unstructured", "sparsity": 0.7, "cap": 0.8},
}
SEEDS = 20  # draws that a table looks for
BUDGETS = ("macs=70%", "macs=50%")
PROTECT = {
    "resnet20": ("conv1", "linear"),
    "resnet56": ("conv1", "linear"),
    "mobilenet_v2": ("features.0.0", "classifier.1"),
    "vit": ("patch_embed.proj", "head"),
}
LADDER = ("cut", "recalibrated", "least squares", "look ahead", "paper", "paper, recalibrated")
TIMED = ("least squares", "look ahead", "paper")
# What is known of the paper's settings: exact curvature, the look ahead, and the most steps of
# conjugate gradients. Damping and tolerance are those of the pass, one step per batch its length.
AHEAD = {"resnet20": 20, "resnet56": 30, "mobilenet_v2": 30, "vit": 30}
PAPER = Reconstruct(solver="paper", curvature="newton", steps=8, cg_steps=500, held_out=0.0)


def prepared(study: Study, task: str, seed: int) -> tuple[Program, Context]:
    """Return the network masked or cut, and what its recovery may use."""
    program, context = study.program.copy(), study.context(seed)
    if task in MASKS:
        Sparsify(**MASKS[task], protect=PROTECT[study.out.name])(program, context)  # type: ignore[arg-type]
        return program, context
    AnnotateSensitivity()(program, context)
    PlanChannels(macs=task.partition("=")[2])(program, context)
    RemoveChannels()(program, context)
    return program, context


def ladder(study: Study, task: str, seed: int, recovery: Reconstruct) -> dict[str, Any]:
    """Measure the accuracy after every step of the recovery, and the time that it takes."""
    program, context = prepared(study, task, seed)
    found: dict[str, Any] = {"cut": study.correct(program)}
    found["macs"] = cost(program).macs / cost(study.program).macs
    RecalibrateNorms()(program, context)
    found["recalibrated"] = study.correct(program)
    ways = {"least squares": replace(recovery, lookahead=0), "look ahead": recovery}
    for name, way in ways.items():
        mended, start = program.copy(), time.process_time()
        outcome = way(mended, context)
        found[f"{name}, seconds"] = time.process_time() - start
        found[name] = study.correct(mended)
        found[f"{name}, details"] = outcome.details
    return found


def published(study: Study, task: str, seed: int, way: Reconstruct, at_once: int) -> None:
    """Mend masks by the paper's settings, some layers per piece, and measure what it came to."""
    program, context = prepared(study, task, seed)
    weights = [node for node in map(str, _in_order(program)) if node in program.get(MASKED).keep]
    name, seconds = f"{_slug(task)}-{seed}-paper", 0.0
    for start in range(0, len(weights), at_once):
        part = tuple(weights[start : start + at_once])
        stored = study.out / f"{name}-{start}.safetensors"

        def mend(part: tuple[str, ...] = part, stored: Path = stored) -> dict[str, Any]:
            begun = time.process_time()
            outcome = replace(way, only=part)(program, context)
            taken = time.process_time() - begun
            save_file({name: program.tensor(name).detach() for name in part}, stored)
            return {"seconds": taken, "details": outcome.details}

        seconds += study.piece(f"{name}-{start}", mend)["seconds"]
        for weight, value in load_file(stored).items():
            set_tensor(program, weight, value)

    def measure() -> dict[str, Any]:
        found = {"paper, seconds": seconds, "paper": study.correct(program)}
        RecalibrateNorms()(program, context)
        return {**found, "paper, recalibrated": study.correct(program)}

    study.piece(name, measure)


def _in_order(program: Program) -> Iterator[Any]:
    return (node.target for node in program.tensor_nodes())


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table per network: mean and spread over draws, in percent."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        if (folder / "dense.json").exists():
            yield f"\n{folder.name}: dense {100 * float((folder / 'dense.json').read_text()):.2f}\n"
        yield f"| task | {' | '.join(LADDER)} | seconds | draws |"
        yield "|---" * (len(LADDER) + 3) + "|"
        for task in (*MASKS, *BUDGETS):
            found = [each for seed in range(SEEDS) if (each := _measured(folder, task, seed))]
            if not found:
                continue
            cells = [
                percent([each[name] for each in found if name in each], 2) for name in LADDER
            ]  # fmt: skip
            times = [[each.get(f"{name}, seconds") for each in found] for name in TIMED]
            seconds = [f"{np.mean([t for t in each if t]):.0f}" for each in times if any(each)]
            yield f"| {task} | {' | '.join(cells)} | {', '.join(seconds)} | {len(found)} |"


def _measured(folder: Path, task: str, seed: int) -> dict[str, Any]:
    """What has been measured on one draw."""
    files = [folder / f"{_slug(task)}-{seed}{which}.json" for which in ("", "-paper")]
    parts = [json.loads(path.read_text()) for path in files if path.exists()]
    return {key: value for part in parts for key, value in part.items()}


def _slug(task: str) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in task)


def main() -> None:
    """Run a study, or print its table."""
    keep_freed_memory()
    parser = study_options(__doc__)
    parser.add_argument("--tasks", nargs="*", default=(*MASKS, *BUDGETS))
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--lookahead", type=int, default=12)
    parser.add_argument("--evaluated", type=int, default=10_000)
    parser.add_argument("--ways", nargs="*", choices=("ours", "paper"), default=("ours", "paper"))
    parser.add_argument(
        "--cg-steps",
        type=int,
        default=PAPER.cg_steps,
        help="conjugate-gradient steps with the paper's settings",
    )
    parser.add_argument(
        "--at-once", type=int, default=3, help="layers per piece with the paper's settings"
    )
    options = parser.parse_args()
    if options.network and options.folder:
        study = Study.load(options.network, options.folder, options.out)
        network = replace(NETWORKS[options.network], evaluated=options.evaluated)
        study = replace(study, network=network)
        study.piece("dense", lambda: study.correct(study.program))
        for seed in range(options.seeds):
            for task in options.tasks:
                _measure(study, task, seed, options)
    if options.table:
        print("\n".join(table(options.out)))


def _measure(study: Study, task: str, seed: int, options: argparse.Namespace) -> None:
    recovery = Reconstruct(samples=options.samples, lookahead=options.lookahead)
    if "ours" in options.ways:
        study.piece(f"{_slug(task)}-{seed}", lambda: ladder(study, task, seed, recovery))
    if "paper" in options.ways and task in MASKS:
        ahead = AHEAD[study.out.name]
        way = replace(PAPER, samples=options.samples, lookahead=ahead, cg_steps=options.cg_steps)
        published(study, task, seed, way, options.at_once)


if __name__ == "__main__":
    main()
