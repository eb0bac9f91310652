"""A run between its beginnings and its files: passes, checks, figures, report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fxprune.graph.facts import MASKS
from fxprune.graph.program import Program
from fxprune.onnx.export import parity_limit
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.report.content import Check, GroupEntry, Measures, RunReport, TargetEntry, environment
from fxprune.run.candidates import settle
from fxprune.run.checkpoint import Checkpoint, Journal
from fxprune.run.checks import (
    ACCURACY_LIMIT,
    accuracy_limit,
    check_masks,
    check_removal,
    result_checks,
)
from fxprune.run.job import Job
from fxprune.run.measure import measures
from fxprune.structure.groups import Group
from fxprune.training.evaluate import Evaluation

LOSS = 0.05  # of accuracy, which is worth a word


def run(job: Job, kept: Checkpoint | None, aside: Path) -> tuple[Program, RunReport]:
    """Check, measure, run the passes, write ``model.onnx`` into a folder, measure again."""
    options, dense, judge = job.options, job.dense, job.judge
    checks = {"zero_then_remove": Check.skipped("--no-verify was given")}
    if options.verify:
        options.progress.say("checking that removal is exact (zero-then-remove)")
        checks["zero_then_remove"] = check_removal(dense, job.groups, options.seed)
    before = judge.program(dense, "evaluating the dense model")
    end = settle(job, kept, before, aside)
    small, journal, quantized = end.program, end.journal, is_quantized(end.program)
    after = judge.program(small, "evaluating the small model")
    small.to("cpu").eval()
    checks |= result_checks(
        end.emission.export, before, after, end.judged, options.max_drop, parity_limit(small),
        accuracy_limit(end.checks) if quantized else ACCURACY_LIMIT,
    )  # fmt: skip
    if MASKS.name in small.facts:
        checks["masks"] = check_masks(small, aside / "model.onnx")
    checks |= end.checks
    first = measures(dense, end.dense, before)
    last = measures(small, end.emission, end.judged)
    return small, RunReport(
        first,
        last,
        _targets(job, journal, first, last),
        tuple(journal.entries),
        checks,
        tuple(_group(group, journal, small) for group in job.groups),
        environment(options.device, options.seed, options.threads or 1),
        (*_notes(job, journal, before), *_loss(job, before, end.judged)),
        journal.curves,
        end.emission.speedup,
        trials=job.trials,
        precision=end.precision,
    )


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


def _group(group: Group, journal: Journal, small: Program) -> GroupEntry:
    """Tell what became of a group, which may have gone with the layers that it was in."""
    left = small.graph_module.state_dict()
    stored = [slot.tensor for slot in group.slots if not slot.tensor.startswith("node:")]
    removed = journal.removed.get(group.name, 0)
    if group.frozen_because is None and not any(name in left for name in stored):
        removed = len(group.units)
    return GroupEntry(
        group.name,
        tuple(map(str, group.slots)),
        len(group.units),
        removed,
        journal.implanted.get(group.name, 0),
        group.frozen_because,
    )


def _notes(job: Job, journal: Journal, before: Evaluation) -> tuple[str, ...]:
    notes = list(job.data.notes) if job.data else []
    notes += [before.note] if before.note else []
    for entry in journal.entries:
        notes += (entry.outcome.details or {}).get("notes", [])
    return tuple(notes)


def _loss(job: Job, before: Evaluation, after: Evaluation) -> Iterator[str]:
    """Say so where much accuracy is gone, and nobody said how much may go."""
    if job.options.max_drop is not None or before.accuracy is None or after.accuracy is None:
        return
    lost = before.accuracy - after.accuracy
    if lost > LOSS:
        yield (
            f"{100 * lost:.1f} points of accuracy are lost; ask for less with --target, train with "
            "--epochs, or say with --max-drop how many may go"
        )
