"""Compare the removal of residual branches with that of channels, at equal multiply-accumulates.

    python -m tools.blocks_study resnet56 --folder DATA --out DIR   # resumable, piece by piece
    python -m tools.blocks_study --out DIR --table                  # print the results

Per network, share of multiply-accumulates that remains, and draw of the calibration data: the
accuracy before recovery, after recalibrating batch norms, and after reconstruction by least
squares, without training, on held-out images; and the speed-up over the dense network of ONNX
models in FP32 and INT8, interleaved. Branches are removed by how much they move the output, or at
random (control).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fxprune import cost
from fxprune.cli.allocator import keep_freed_memory
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    AnnotateSensitivity,
    ConvertQuantized,
    FoldBatchNorm,
    InsertObservers,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveBlocks,
    RemoveChannels,
    TrainQuantized,
)
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.blocks import remove_blocks
from tools.rank_study import Study
from tools.study_models import percent, study_options

KEYS = ("cut", "recalibrated", "reconstructed")
TARGETS = ("80%", "70%", "60%", "50%")
WAYS = ("channels", "blocks", "random blocks")
CODES = (InsertObservers(), TrainQuantized(samples=128), ConvertQuantized())


def cut(study: Study, target: str, way: str, seed: int) -> Program:
    """Cut a copy of the network down."""
    program, context = study.program.copy(), study.context(seed)
    if way == "channels":
        plan = AnnotateSensitivity(samples=study.network.samples), PlanChannels(macs=target)
        Pipeline((*plan, RemoveChannels())).run(program, context)
    elif way == "blocks":
        RemoveBlocks(macs=target, samples=128)(program, context)
    else:
        random = np.random.default_rng(seed)
        limit = float(target.rstrip("%")) / 100 * cost(program).macs
        list(remove_blocks(program, limit, lambda trial: random.random(), lambda branch: True))
    return program


def measure(study: Study, target: str, way: str, seed: int, seconds: float) -> dict[str, Any]:
    """Measure the accuracy as cut, recalibrated and reconstructed, and the speed-up."""
    program, context = cut(study, target, way, seed), study.context(seed)
    found: dict[str, Any] = {"macs": cost(program).macs / cost(study.program).macs}
    found["params"] = cost(program).params / cost(study.program).params
    found["cut"] = study.correct(program)
    RecalibrateNorms(samples=512)(program, context)
    found["recalibrated"] = study.correct(program)
    Reconstruct(samples=study.network.samples * 2)(program, context)
    found["reconstructed"] = study.correct(program)
    return found | ({} if seed else {"speed": _speed(study, program, seconds)})


def _speed(study: Study, program: Program, seconds: float) -> dict[str, float]:
    """Return speed-ups over the dense network, in floats and in codes."""
    dense = study.program.copy().eval()
    context = study.context(0)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "fp32", "int8")}
        for name, one in (("dense", dense), ("fp32", program)):
            FoldBatchNorm()(one, context)
            export_onnx(one, files[name])
        Pipeline(CODES).run(program, context)
        export_onnx(program, files["int8"])
        times = compare({name: str(path) for name, path in files.items()}, seconds=seconds)
    return {name: times[name].speedup for name in ("fp32", "int8")}


def table(out: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table per network."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        dense = json.loads((folder / "dense.json").read_text())
        yield f"\n{folder.name}: dense {100 * dense:.1f} %\n"
        columns = "before recovery | recalibrated | reconstructed | FP32 | INT8"
        yield f"| MACs | method | remaining | {columns} |"
        yield "|---|---|---|---|---|---|---|---|"
        for target in TARGETS:
            for way in WAYS:
                files = sorted(folder.glob(f"{way.replace(' ', '-')}-[0-9]*-{target}.json"))
                results = [json.loads(path.read_text()) for path in files]
                if not results:
                    continue
                cells = [percent([result[key] for result in results]) for key in KEYS]
                left = f"{np.mean([result['macs'] for result in results]):.0%}"
                speed: dict[str, float] = next(
                    (result["speed"] for result in results if "speed" in result), {}
                )
                fast = [f"{speed[name]:.2f}" if speed else "-" for name in ("fp32", "int8")]
                yield f"| {target} | {way} | {left} | {' | '.join([*cells, *fast])} |"


def main() -> None:
    """Run a study, or print its table."""
    keep_freed_memory()
    parser = study_options(__doc__)
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--images", type=int, help="number of held-out images for accuracy")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing per piece")
    options = parser.parse_args()
    if options.network and options.folder:
        study = Study.load(options.network, options.folder, options.out)
        if options.images:
            study = replace(study, network=replace(study.network, evaluated=options.images))
        study.piece("dense", lambda: study.correct(study.program))
        for seed in range(options.seeds):
            for target in options.targets:
                for way in WAYS:
                    study.piece(
                        f"{way.replace(' ', '-')}-{seed}-{target}",
                        lambda w=way, s=seed, t=target: measure(  # type: ignore[misc]
                            study, t, w, s, options.seconds
                        ),
                    )
    if options.table:
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
