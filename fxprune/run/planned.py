"""Jobs whose passes a search chooses: the fastest network within a limit, and safer ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fxprune.data.roles import subset
from fxprune.errors import InputError
from fxprune.run.checks import check_drop
from fxprune.run.job import Job
from fxprune.run.options import pipeline_for_plan
from fxprune.run.plan_search import PlanSearch
from fxprune.training.evaluate import Evaluation


def with_searched_plan(job: Job) -> Job:
    """Replace the passes of a job by those that carry out the best plan for the whole network.

    Without targets it is the fastest one within ``max_drop``, with a target for latency the most
    accurate one within it. Jobs with other targets or a pipeline of their own are returned as they
    are, and so is a job whose accuracy cannot be measured, unless it sets ``max_drop``.

    Raises:
        InputError: a limit on the accuracy lost was set, and accuracy cannot be measured.
        BudgetError: no plan meets the latency target.

    """
    if not job.searches_plan:
        return job
    by_latency = bool(job.targets)
    if not by_latency and (obstacle := _obstacle(job)) is not None:
        if job.options.max_drop is not None:
            raise InputError(f"max-drop needs accuracy, which cannot be measured: {obstacle}")
        return job.with_default_targets(f"no search for the fastest network: {obstacle}")
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        search = PlanSearch(job, Path(folder))
        plans = search.within_latency() if by_latency else search.within_drop()
        frontier = search.frontier(job.options.frontier)
    options = job.options
    if not by_latency:
        options = replace(options, max_drop=options.allowed_drop)
    pipelines = [pipeline_for_plan(plan, options) for plan in plans]
    return replace(
        job, options=options, pipeline=pipelines[0], alternatives=tuple(pipelines[1:]),
        trials=tuple(search.trials), frontier=frontier, search=search.record(),
        notes=(*job.notes, *search.notes), elsewhere=search.elsewhere(plans[0]),
    )  # fmt: skip


def attempts(job: Job) -> Iterator[Job]:
    """Yield a job and, for as long as the caller goes on, the same with safer passes."""
    yield job
    for number, pipeline in enumerate(job.alternatives, start=1):
        note = "a faster network lost too much on the evaluation samples; this one is safer"
        yield replace(
            job, pipeline=pipeline, alternatives=job.alternatives[number:], notes=(*job.notes, note)
        )  # fmt: skip


def keeps_promise(job: Job, before: Evaluation, after: Evaluation) -> bool:
    """Return whether a result loses no more accuracy than its job allows."""
    limit = job.options.max_drop
    return limit is None or check_drop(before, after, limit).passed is not False


def _obstacle(job: Job) -> str | None:
    """Return why accuracy cannot be measured, on one batch of the evaluation samples."""
    if not job.options.onnx:
        return "--no-onnx was given, and latency is measured in ONNX Runtime"
    if job.data is None or job.data.eval is None:
        return "there is no evaluation data"
    few = subset(job.data.eval, 4, job.options.seed)
    found = replace(job.judge, data=replace(job.data, eval=few)).program(job.dense, "evaluating")
    return None if found.accuracy is not None else found.note or "the targets are not classes"
