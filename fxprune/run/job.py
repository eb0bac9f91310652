"""What a run works on: a model, data, passes, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxprune.data.roles import Data
from fxprune.graph.facts import CONVERTED, OBSERVED, PLAN
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Target
from fxprune.planning.search import Limits, Trial, budgeted, search, winner
from fxprune.run.checkpoint import fingerprint
from fxprune.run.measure import Judge
from fxprune.run.options import Options
from fxprune.structure.groups import Group


@dataclass(frozen=True)
class Job:
    """What a run works on: the dense program, where it began, and what is asked of it.

    ``trials`` are those of the search that found the targets, if there was one.
    """

    dense: Program
    groups: tuple[Group, ...]
    data: Data | None
    pipeline: Pipeline
    targets: tuple[Target, ...]
    options: Options
    trials: tuple[Trial, ...] = ()

    @property
    def judge(self) -> Judge:
        """What measures accuracy."""
        options = self.options
        return Judge(
            self.data, self.dense, options.batch_size, options.device, options.threads,
            options.progress,
        )  # fmt: skip

    @property
    def context(self) -> Context:
        """What the passes share."""
        options = self.options
        return Context(
            self.data, options.device, options.seed, options.loss, self.dense, options.progress,
            options.threads or 1,
        )  # fmt: skip

    @property
    def in_floats(self) -> Pipeline:
        """The passes before those that bring in codes; all of them, if none do."""
        steps = self.pipeline.passes
        converts = [n for n, step in enumerate(steps) if CONVERTED in step.gives]
        starts = [n for n, step in enumerate(steps) if OBSERVED in step.gives]
        return Pipeline(steps[: starts[0]]) if starts and converts else self.pipeline

    @property
    def free(self) -> bool:
        """Whether codes are kept only where they turn out better than floats."""
        return self.options.int8 is None and self.options.pipeline is None


def aimed(job: Job) -> Job:
    """Search for the budget of a job that plans and has only a limit on the accuracy lost."""
    drop = job.options.max_drop
    plans = any(PLAN in step.gives for step in job.pipeline)
    if drop is None or job.targets or not plans:
        return job
    job.options.progress.say("searching for the smallest model that keeps its accuracy")
    allowed = Limits(drop)
    dense = job.dense.copy().to(job.options.device)

    def accuracy(program: Program) -> float | None:
        return job.judge.program(program, "evaluating").accuracy

    pipeline = job.in_floats if job.free else job.pipeline
    trials = search(dense, pipeline, job.context, accuracy, allowed)
    target = Target.parse(winner(trials, allowed).target)
    steps = tuple(budgeted(step, target) for step in job.pipeline)
    return replace(job, pipeline=Pipeline(steps), targets=(target,), trials=trials)


def fingerprint_of(job: Job) -> str:
    """Return a hash of all that a checkpoint depends on, the passes aside."""
    sizes = [f"{role}={len(samples)}" for role, samples in job.data.roles()] if job.data else []
    options = (job.options.seed, job.options.device, job.options.batch_size, *sizes)
    return fingerprint(job.dense, options)
