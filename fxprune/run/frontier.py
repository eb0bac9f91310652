"""The frontier: models at several latencies, all from one search."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from fxprune.errors import InputError
from fxprune.pipeline.text import Recipe, write_recipe
from fxprune.planning.budget import Target
from fxprune.report.content import FrontierPoint
from fxprune.run.candidates import measure_candidates, run_passes, select_precision
from fxprune.run.checkpoint import Checkpoint
from fxprune.run.job import Job
from fxprune.run.measure import Exported
from fxprune.run.options import pipeline_for_plan
from fxprune.training.comparison import paired_drop
from fxprune.training.evaluate import Evaluation

DEFAULT_FACTORS = ("1.5x", "2x", "3x", "4x")


def write_points(
    job: Job, before: Evaluation, dense: Exported | None, folder: Path
) -> tuple[FrontierPoint, ...]:
    """Carry out the plans of a job's frontier, each into ``points/NAME`` of a folder.

    Args:
        job: the dense program, the data and the options.
        before: the dense model's evaluation.
        dense: the dense model's file.
        folder: gets ``points/NAME/model.onnx``, ``figures.json`` and ``recipe.toml``.

    """
    found = []
    for name, plan in job.frontier.items():
        job.options.progress.say(f"making the model of the frontier at {name}")
        pipeline = pipeline_for_plan(plan, job.options)
        one = replace(job, pipeline=pipeline, alternatives=())
        place = folder / "points" / name
        place.mkdir(parents=True)
        candidates = run_passes(one, Checkpoint.none())
        measured = measure_candidates(one, candidates, dense, place / "trial")
        precision = select_precision(one, measured, before)
        chosen = measured.kept(precision)
        if chosen.emission is None:
            job.options.progress.note(f"the model of the frontier at {name}: {measured.no_file}")
            continue
        chosen.emission.move_to(place)
        drop = paired_drop(before, chosen.accuracy)
        point = FrontierPoint(
            name, chosen.emission.latency.median_ms, chosen.emission.latency.speedup,
            chosen.accuracy.accuracy, str(drop) if drop else None,
            chosen.emission.export.onnx_bytes, precision.kept if precision else "fp32",
        )  # fmt: skip
        (place / "figures.json").write_text(json.dumps(asdict(point), indent=2), encoding="utf-8")
        recipe = Recipe(pipeline, job.options.recipe_fields())
        (place / "recipe.toml").write_text(write_recipe(recipe), encoding="utf-8")
        found.append(point)
    return tuple(found)


def parse_factors(text: str | Iterable[str]) -> tuple[str, ...]:
    """Read ``1.5x,2x``, or an empty text for the default factors.

    Raises:
        InputError: a part is not a factor above 1.

    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    parts = [part.strip() for part in parts if part.strip()] or list(DEFAULT_FACTORS)
    for part in parts:
        if not part.endswith("x") or Target.of("latency", part).limit(1.0) >= 1.0:
            raise InputError(
                f"'{part}' is not a speed-up over the dense model; write, for example, "
                "--frontier 1.5x,2x,3x"
            )
    return tuple(parts)
