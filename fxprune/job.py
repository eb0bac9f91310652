"""A run between its beginnings and its files: passes, checks, figures, report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fxprune.budget import Target
from fxprune.checkpoint import Checkpoint, Journal, fingerprint
from fxprune.checks import ACCURACY_LIMIT, check_masks, check_removal, result_checks
from fxprune.context import Context
from fxprune.data import Data
from fxprune.evaluate import Evaluation
from fxprune.export import parity_limit
from fxprune.facts import MASKS, PLAN
from fxprune.groups import Group
from fxprune.measure import Judge, emit, measures
from fxprune.options import Options
from fxprune.pipeline import Entry, Pipeline
from fxprune.program import Program
from fxprune.quantization_checks import DISAGREEMENT, check_quantized
from fxprune.quantization_onnx import is_quantized
from fxprune.report import Check, GroupEntry, Measures, RunReport, TargetEntry, environment
from fxprune.search import Limits, Trial, budgeted, search, winner


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

    trials = search(dense, job.pipeline, job.context, accuracy, allowed)
    target = Target.parse(winner(trials, allowed).target)
    steps = tuple(budgeted(step, target) for step in job.pipeline)
    return replace(job, pipeline=Pipeline(steps), targets=(target,), trials=trials)


def run(job: Job, kept: Checkpoint | None, aside: Path) -> tuple[Program, RunReport]:
    """Check, measure, run the passes, write ``model.onnx`` into a folder, measure again."""
    options, dense, say = job.options, job.dense, job.options.progress.say
    checks = {"zero_then_remove": Check.skipped("--no-verify was given")}
    if options.verify:
        say("checking that removal is exact (zero-then-remove)")
        checks["zero_then_remove"] = check_removal(dense, job.groups, options.seed)
    judge = job.judge
    before = judge.program(dense, "evaluating the dense model")
    small, journal = _optimise(job, kept)
    after = judge.program(small, "evaluating the small model")
    dense.to("cpu").eval(), small.to("cpu").eval()
    say("exporting to ONNX and measuring latency")
    emission = emit(
        dense, small, aside / "model.onnx",
        threads=options.threads or 1, seconds=options.latency_seconds,
    )  # fmt: skip
    in_file = judge.file(aside / "model.onnx", "evaluating the ONNX file")
    quantized = is_quantized(small)
    checks |= result_checks(
        emission.small, before, after, in_file, options.max_drop, parity_limit(small),
        DISAGREEMENT if quantized else ACCURACY_LIMIT,
    )  # fmt: skip
    if MASKS.name in small.facts:
        checks["masks"] = check_masks(small, aside / "model.onnx")
    if quantized:
        checks |= check_quantized(small, aside / "model.onnx", job.data)
    large = measures(dense, emission.dense, emission.latency["before"], before)
    little = measures(small, emission.small, emission.latency["after"], in_file)
    return small, RunReport(
        large,
        little,
        _targets(job, journal, large, little),
        tuple(journal.entries),
        checks,
        tuple(_group(group, journal) for group in job.groups),
        environment(options.device, options.seed, options.threads or 1),
        _notes(job, journal, before),
        journal.curves,
        emission.speedup,
        trials=job.trials,
    )


def _optimise(job: Job, kept: Checkpoint | None) -> tuple[Program, Journal]:
    """Run the passes, from the checkpoint on if that is asked for."""
    options = job.options
    found = kept.load() if kept and options.resume else None
    if found is None:
        program, journal = job.dense.copy(), Journal()
    else:
        program, journal = found
        options.progress.say(
            f"resuming after pass {len(journal.entries)} of {len(job.pipeline.passes)}"
        )
    if kept and not options.resume:
        kept.drop()
    program.to(options.device)
    plan = program.facts.get(PLAN.name)

    def observe(program: Program, entry: Entry) -> None:
        nonlocal plan
        step = job.pipeline.passes[len(journal.entries)]
        journal.add(step, entry, program, plan)
        plan = program.facts.get(PLAN.name)
        options.progress.say(f"{entry.spec}: {entry.seconds:.1f} s")
        if kept:
            kept.save(program, journal)

    job.pipeline.run(program, job.context, (observe,), done=tuple(journal.entries))
    return program, journal


def fingerprint_of(job: Job) -> str:
    """Return a hash of all that a checkpoint depends on, the passes aside."""
    sizes = [f"{role}={len(samples)}" for role, samples in job.data.roles()] if job.data else []
    options = (job.options.seed, job.options.device, job.options.batch_size, *sizes)
    return fingerprint(job.dense, options)


def _targets(
    job: Job, journal: Journal, before: Measures, after: Measures
) -> tuple[TargetEntry, ...]:
    """Hold the result against the targets, beside what the last plan predicted."""
    details = [entry.outcome.details or {} for entry in journal.entries]
    plans = [one["predicted"] for one in details if "predicted" in one]
    predicted = plans[-1] if plans else {}
    return tuple(
        TargetEntry.of(target, before, after, predicted.get(target.quantity))
        for target in job.targets
    )


def _group(group: Group, journal: Journal) -> GroupEntry:
    return GroupEntry(
        group.name,
        tuple(map(str, group.slots)),
        len(group.units),
        journal.removed.get(group.name, 0),
        journal.implanted.get(group.name, 0),
        group.frozen_because,
    )


def _notes(job: Job, journal: Journal, before: Evaluation) -> tuple[str, ...]:
    notes = list(job.data.notes) if job.data else []
    notes += [before.note] if before.note else []
    for entry in journal.entries:
        notes += (entry.outcome.details or {}).get("notes", [])
    return tuple(notes)
