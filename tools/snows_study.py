"""Measure what reconstruction recovers, on masks and after removal.

    python -m tools.snows_study resnet20 --folder DATA --out DIR     # resumable, piece by piece
    python -m tools.snows_study --out DIR --table                    # what has been measured so far

Per network and task: the accuracy on held-out images as cut or masked, with batch norms
recalibrated, with layers solved for by least squares, and with a look ahead; for several draws of
the calibration images. No labels are used. Every figure is a file in the output folder; what is
there is not measured again.
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

from fxprune import cost
from fxprune.passes import (
    AnnotateSensitivity,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
    Sparsify,
)
from tools.rank_study import Study
from tools.study_models import NETWORKS

# Masks are on all layers but the first and the last.
MASKS = {
    "1:4": {"pattern": "1:4"},
    "2:4": {"pattern": "2:4"},
    "unstructured 70%": {"pattern": "unstructured", "sparsity": 0.7, "cap": 0.8},
}
BUDGETS = ("macs=70%", "macs=50%")
PROTECT = {
    "resnet20": ("conv1", "linear"),
    "resnet56": ("conv1", "linear"),
    "mobilenet_v2": ("features.0.0", "classifier.1"),
}
LADDER = ("cut", "recalibrated", "least squares", "look ahead")


def ladder(study: Study, task: str, seed: int, recovery: Reconstruct) -> dict[str, Any]:
    """Measure the accuracy after every step of the recovery, and the time that it takes."""
    program, context = study.program.copy(), study.context(seed)
    if task in MASKS:
        Sparsify(**MASKS[task], protect=PROTECT[study.out.name])(program, context)  # type: ignore[arg-type]
    else:
        AnnotateSensitivity()(program, context)
        PlanChannels(macs=task.partition("=")[2])(program, context)
        RemoveChannels()(program, context)
    found: dict[str, Any] = {"cut": study.correct(program)}
    found["macs"] = cost(program).macs / cost(study.program).macs
    RecalibrateNorms()(program, context)
    found["recalibrated"] = study.correct(program)
    ways = {"least squares": replace(recovery, lookahead=0), "look ahead": recovery}
    for name, way in ways.items():
        mended, start = program.copy(), time.perf_counter()
        outcome = way(mended, context)
        found[f"{name}, seconds"] = time.perf_counter() - start
        found[name] = study.correct(mended)
        found[f"{name}, details"] = outcome.details
    return found


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table per network: mean and spread over draws, in percent."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        if (folder / "dense.json").exists():
            yield f"\n{folder.name}: dense {100 * float((folder / 'dense.json').read_text()):.2f}\n"
        yield f"| task | {' | '.join(LADDER)} | seconds | draws |"
        yield "|---" * (len(LADDER) + 3) + "|"
        for task in (*MASKS, *BUDGETS):
            files = sorted(folder.glob(f"{_slug(task)}-*.json"))
            found = [json.loads(path.read_text()) for path in files]
            if not found:
                continue
            cells = [_spread([100 * each[name] for each in found]) for name in LADDER]
            seconds = [
                f"{np.mean([each[f'{name}, seconds'] for each in found]):.0f}"
                for name in LADDER[2:]
            ]  # fmt: skip
            yield f"| {task} | {' | '.join(cells)} | {', '.join(seconds)} | {len(found)} |"


def _slug(task: str) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in task)


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def main() -> None:
    """Run a study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network", nargs="?", choices=sorted(PROTECT))
    parser.add_argument("--folder", type=Path, help="where weights and images lie")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=(*MASKS, *BUDGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--lookahead", type=int, default=12)
    parser.add_argument("--evaluated", type=int, default=10_000)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.network and options.folder:
        study = Study.load(options.network, options.folder, options.out)
        network = replace(NETWORKS[options.network], evaluated=options.evaluated)
        study = replace(study, network=network)
        study.piece("dense", lambda: study.correct(study.program))
        recovery = Reconstruct(samples=options.samples, lookahead=options.lookahead)
        for seed in range(options.seeds):
            for task in options.tasks:
                name = f"{_slug(task)}-{seed}"
                study.piece(name, lambda t=task, s=seed: ladder(study, t, s, recovery))  # type: ignore[misc]
    if options.table:
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
