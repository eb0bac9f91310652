"""Compare implants with removal alone, at equal multiply-accumulates, without training.

    python -m tools.implant_study resnet20 --folder DATA --out DIR  # resumable, piece by piece
    python -m tools.implant_study --out DIR --table                 # print the results

Per network, share of multiply-accumulates that remains, and draw of the calibration data: the
accuracy before recovery, after recalibrating batch norms, and after reconstruction by least
squares, each on held-out images; and the interleaved latency of the folded ONNX models. Every
figure is a file in the output folder, and existing files are not measured again.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from fxprune import cost
from fxprune.cli.allocator import keep_freed_memory
from fxprune.graph.facts import SENSITIVITY, Sensitivity
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    AnnotateSensitivity,
    FoldBatchNorm,
    ImplantLowRank,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
)
from fxprune.sensitivity.task import Criterion
from tools.rank_study import Study
from tools.study_models import percent, study_options

KEYS = ("cut", "recalibrated", "reconstructed")
TARGETS = ("70%", "50%", "30%")
WAYS: dict[str, float | str] = {"removal": 0.0, "ratio 0.3": 0.3, "auto": "auto"}
CRITERION: Criterion = "output-shift"
INDEXING = {"Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"}


def cut(study: Study, target: str, ratio: float | str, seed: int) -> Program:
    """Plan and remove on a copy of the network."""
    program, context = study.program.copy(), study.context(seed)
    program.put(SENSITIVITY, scores(study, seed))
    PlanChannels(macs=target, implant_ratio=ratio)(program, context)
    RemoveChannels()(program, context)
    return program


def implant(study: Study, program: Program, seed: int) -> list[str]:
    """Put the planned implants in; returns their kinds."""
    done = ImplantLowRank(samples=256, positions=32768)(program, study.context(seed))
    return [told["kind"] for told in done.details.get("implants", [])]


@functools.cache
def scores(study: Study, seed: int) -> Sensitivity:
    """Score all units for one draw of the calibration images."""
    program = study.program.copy()
    step = AnnotateSensitivity(CRITERION, samples=study.network.samples, batch_size=32)
    step(program, study.context(seed))
    return program.get(SENSITIVITY)


def accuracy(study: Study, target: str, way: str, seed: int) -> dict[str, Any]:
    """Measure the accuracy as cut, recalibrated and reconstructed."""
    program, context = cut(study, target, WAYS[way], seed), study.context(seed)
    found: dict[str, Any] = {"kinds": implant(study, program, seed)}
    found["cut"] = study.correct(program)
    RecalibrateNorms(samples=512)(program, context)
    found["recalibrated"] = study.correct(program)
    Reconstruct(samples=study.network.samples * 2)(program, context)
    found["reconstructed"] = study.correct(program)
    return found | {"macs": cost(program).macs / cost(study.program).macs}


def latency(study: Study, target: str, seconds: float) -> dict[str, Any]:
    """Time all ways against each other, and count what indexes at run time."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str | Path] = {}
        indexing = {}
        for way, ratio in WAYS.items():
            program = cut(study, target, ratio, 0)
            implant(study, program, 0)
            FoldBatchNorm()(program.eval(), study.context(0))
            files[way] = Path(folder) / f"{len(files)}.onnx"
            export_onnx(program, files[way])
            nodes = onnx.load(files[way]).graph.node
            indexing[way] = sum(node.op_type in INDEXING for node in nodes)
        found = compare(files, seconds=seconds)
    ms = {way: times.median_ms for way, times in found.items()}
    return {"latency": ms, "indexing": indexing}


def run(
    study: Study, seeds: int, targets: tuple[str, ...], ways: tuple[str, ...], seconds: float
) -> None:
    """Measure every piece that is not there yet."""
    study.piece("dense", lambda: study.correct(study.program))
    for seed in range(seeds):
        for target in targets:
            for way in ways:
                study.piece(
                    f"{way.replace(' ', '-')}-{seed}-{target}",
                    lambda w=way, s=seed, t=target: accuracy(study, t, w, s),  # type: ignore[misc]
                )
    for target in targets:
        study.piece(f"latency-{target}", lambda t=target: latency(study, t, seconds))  # type: ignore[misc]


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table per network."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        dense = folder / "dense.json"
        shown = f"{100 * json.loads(dense.read_text()):.1f} %" if dense.exists() else "-"
        yield f"\n{folder.name}: dense {shown}\n"
        yield "| remaining MACs | method | before recovery | recalibrated | reconstructed | ms |"
        yield "|---|---|---|---|---|---|"
        for target in TARGETS:
            times = folder / f"latency-{target}.json"
            found = json.loads(times.read_text())["latency"] if times.exists() else {}
            for way in WAYS:
                files = sorted(folder.glob(f"{way.replace(' ', '-')}-*-{target}.json"))
                results = [json.loads(path.read_text()) for path in files]
                cells = [percent([r[key] for r in results if key in r]) for key in KEYS]
                ms = f"{found[way]:.2f}" if way in found else "-"
                yield f"| {target} | {way} | {' | '.join(cells)} | {ms} |"


def main() -> None:
    """Run a study, or print its table."""
    keep_freed_memory()
    parser = study_options(__doc__)
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--ways", nargs="*", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--images", type=int, help="number of held-out images for accuracy")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing per target")
    options = parser.parse_args()
    if options.network and options.folder:
        study = Study.load(options.network, options.folder, options.out)
        if options.images:
            study = replace(study, network=replace(study.network, evaluated=options.images))
        targets, ways = tuple(options.targets), tuple(options.ways)
        run(study, options.seeds, targets, ways, options.seconds)
    if options.table:
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
