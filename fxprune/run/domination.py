"""Whether quantizing the dense model alone would have been at least as good as what was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fxprune.errors import FxpruneError
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.run.candidates import Measured, Measurements
from fxprune.run.job import Job
from fxprune.run.options import pipeline_for_plan
from fxprune.search.plan import NetworkPlan

EQUAL_SPEED = 0.97  # ratios of latencies above this are equal within noise


def better_without_pruning(
    job: Job, measured: Measurements, chosen: Measured, folder: Path
) -> tuple[str, ...]:
    """Return a note if the quantized dense model is as fast as the result and as accurate.

    It concerns targets for MACs, parameters and size, which a search for latency does not serve.

    Args:
        job: what was asked for.
        measured: all results; if there is no INT8 among them, there is nothing to compare with.
        chosen: the result.
        folder: for the dense model's file.

    """
    static = job.options.pipeline is None and job.targets and not job.searches_plan
    accuracy = chosen.accuracy.accuracy
    wanted = static and "int8" in measured.by_name
    if not wanted or accuracy is None or chosen.emission is None:
        return ()
    job.options.progress.say("comparing with the dense model in INT8")
    program, path = job.dense.copy(), folder / "dense-int8.onnx"
    try:
        untrained = replace(job.options, epochs=0)
        pipeline_for_plan(NetworkPlan(), untrained).run(program, job.context)
        export_onnx(program.to("cpu").eval(), path, check=False)
    except FxpruneError:
        return ()  # the dense model cannot be quantized
    context, seconds = job.context, job.options.latency_seconds
    times = compare(
        {"result": chosen.emission.path, "dense": path},
        threads=context.threads,
        seconds=seconds,
        provider=context.provider,
        shapes=context.latency_shapes,
    )
    found = job.judge.file(path, "evaluating the dense model in INT8").accuracy
    if times["dense"].speedup < EQUAL_SPEED or found is None or found < accuracy:
        return ()
    return (
        f"quantizing without pruning is {times['dense'].speedup:.2f}x as fast as this result and "
        f"{100 * (found - accuracy):.1f} percentage points more accurate: compile without "
        "--target, or with --target latency=...",
    )
