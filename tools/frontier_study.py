"""Search networks for their fastest forms: accuracy and latency at several speed-ups.

    python -m tools.frontier_study resnet56 --folder DATA --out DIR --factors 2.6x,3.1x,4.2x
    python -m tools.frontier_study --out DIR --table               # print the results

Per network and draw of the calibration images, without training: the model that the default search
returns (at most one point of accuracy lost), and the models of the frontier. Accuracy is that of
the ONNX files on all held-out images; speed-ups compare with the dense network in FP32, interleaved
on one thread. Resumable: every draw is a file in DIR.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.cli.allocator import keep_freed_memory
from fxprune.data.roles import Data, subset
from fxprune.pipeline.progress import Tracker
from tools.rank_study import Study
from tools.study_models import percent, study_options


def draw(study: Study, seed: int, factors: str, minutes: float) -> dict[str, Any]:
    """Compile the network once, with its frontier, and return what the report says."""
    data = Data(study.calibration, eval=study.held_out)
    result = fxprune.compile(
        study.program, data=data, seed=seed, threads=1, search_minutes=minutes, frontier=factors,
        verify=False, progress=Tracker(shown=True),
    )  # fmt: skip
    report = result.report
    assert report.speedup is not None
    check = report.checks["max_drop"]
    found = {
        "dense": asdict(report.before),
        "default": asdict(report.after),
        "speedup": report.speedup[1],
        "promise": {"passed": check.passed, "note": check.note},
        "frontier": [asdict(point) for point in report.frontier],
        "notes": list(report.notes),
    }
    (study.out / f"report{seed}.json").write_text(report.to_json(), encoding="utf-8")
    return found


def print_table(out: Path) -> None:
    """Print a row per network and model, over the draws that are there."""
    print("| network | model | accuracy, % | speed-up |\n|---|---|---|---|")
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        draws = [json.loads(path.read_text()) for path in sorted(folder.glob("draw*.json"))]
        if not draws:
            continue
        rows: dict[str, list[tuple[float, float]]] = {
            "dense, FP32": [(one["dense"]["accuracy"], 1.0) for one in draws],
            "within one point": [(one["default"]["accuracy"], one["speedup"]) for one in draws],
        }
        for one in draws:
            for point in one["frontier"]:
                measured = point["accuracy"], point["speedup"]
                rows.setdefault(point["name"], []).append(measured)
        for name, values in rows.items():
            mean = sum(speedup for _, speedup in values) / len(values)
            accuracy = percent([accuracy for accuracy, _ in values], 2)
            print(f"| {folder.name} | {name} | {accuracy} | {mean:.2f}x |")
        kept = sum(one["promise"]["passed"] is True for one in draws)
        print(f"| {folder.name} | limit kept on the held-out images | {kept} of {len(draws)} | |")


def main() -> None:
    """Study a network, or print what was found."""
    parser = study_options(__doc__)
    parser.add_argument("--factors", default="2x,3x,4x", help="speed-ups of the frontier")
    parser.add_argument("--minutes", type=float, default=15.0, help="of search per draw")
    parser.add_argument("--images", type=int, help="held-out images to measure on (default: all)")
    given = parser.parse_args()
    if given.table:
        print_table(given.out)
        return
    keep_freed_memory()
    torch.set_num_threads(1)
    study = Study.load(given.network, given.folder, given.out)
    if given.images:
        study = replace(study, held_out=subset(study.held_out, given.images, 0))
    for seed in range(given.seeds):
        one = functools.partial(draw, study, seed, given.factors, given.minutes)
        study.piece(f"draw{seed}", one)


if __name__ == "__main__":
    main()
