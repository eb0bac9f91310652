"""What a finished run leaves: its report, and the files of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fxprune.graph import serialize
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.onnx.benchmark import fallback_note
from fxprune.pipeline.text import Recipe, write_recipe
from fxprune.report.content import (
    Check,
    FrontierPoint,
    GroupEntry,
    Measures,
    RunReport,
    TargetEntry,
    environment,
)
from fxprune.report.html import to_html
from fxprune.report.precision import Precision
from fxprune.run.candidates import Measurements
from fxprune.run.checkpoint import Journal
from fxprune.run.job import Job
from fxprune.run.measure import Emission, measures
from fxprune.run.search_record import FILE
from fxprune.structure.groups import Group
from fxprune.training.evaluate import Evaluation

MAX_UNMENTIONED_LOSS = 0.05  # of accuracy, where no limit was given


def make_report(
    job: Job,
    measured: Measurements,
    precision: Precision | None,
    accuracy: Evaluation,
    checks: Mapping[str, Check],
    frontier: tuple[FrontierPoint, ...] = (),
) -> RunReport:
    """Put together what a run found; ``accuracy`` is the dense model's."""
    chosen, options = measured.kept(precision), job.options
    before = measures(job.dense, measured.dense, accuracy)
    after = measures(chosen.program, chosen.emission, chosen.accuracy)
    journal = chosen.journal
    return RunReport(
        before,
        after,
        _targets(job, journal, before, after),
        tuple(journal.entries),
        checks,
        tuple(_group(group, journal, chosen.program) for group in job.groups),
        environment(options.device, options.seed, options.threads or 1),
        (
            *_notes(job, journal, accuracy),
            *_loss(job, accuracy, chosen.accuracy),
            *_beyond_standard(chosen.emission),
            *_fallback(measured.dense, options.provider),
        ),
        journal.curves,
        None if chosen.emission is None else chosen.emission.speedup,
        trials=job.trials,
        frontier=frontier,
        precision=precision,
    )


def _targets(
    job: Job, journal: Journal, before: Measures, after: Measures
) -> tuple[TargetEntry, ...]:
    """Compare the result with the targets, and with what the last plan predicted."""
    plans = [entry.outcome.predicted for entry in journal.entries if entry.outcome.predicted]
    predicted = dict(plans[-1]) if plans else {}
    if (there := job.elsewhere or _elsewhere(job, journal)) is not None:
        dense, small = there
        before, after = replace(before, latency_ms=dense), replace(after, latency_ms=small)
        predicted["latency_ms"] = small
    return tuple(
        TargetEntry.of(target, before, after, predicted.get(target.quantity))
        for target in job.targets
    )


def _elsewhere(job: Job, journal: Journal) -> tuple[float, float] | None:
    """Return the milliseconds, dense and planned, that plan-channels found for another machine."""
    timed = [entry.outcome.details.get("latency") for entry in journal.entries]
    plans = [one for one in timed if one]
    if job.options.latency_table is None or not plans:
        return None
    return plans[-1]["dense_ms"], plans[-1]["predicted_ms"]


def _group(group: Group, journal: Journal, small: Program) -> GroupEntry:
    """Say what became of a group; all of it is removed if its layers are no longer there."""
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
    notes = list(job.notes)
    notes += [before.note] if before.note else []
    return (*notes, *(note for entry in journal.entries for note in entry.outcome.notes))


def _loss(job: Job, before: Evaluation, after: Evaluation) -> Iterator[str]:
    """Say so if much accuracy was lost and no limit was given."""
    if job.options.max_drop is not None or before.accuracy is None or after.accuracy is None:
        return
    lost = before.accuracy - after.accuracy
    if lost > MAX_UNMENTIONED_LOSS:
        yield (
            f"accuracy fell by {100 * lost:.1f} percentage points: use a milder --target, "
            "fine-tune with --epochs N, or set a limit with --max-drop"
        )


def _beyond_standard(emission: Emission | None) -> Iterator[str]:
    """Name the operators of the file that only ONNX Runtime has."""
    if emission is not None and emission.export.beyond_standard:
        yield (
            f"model.onnx uses {', '.join(emission.export.beyond_standard)}, which only ONNX "
            "Runtime has; use --standard-onnx to avoid them"
        )


def _fallback(emission: Emission | None, provider: str) -> Iterator[str]:
    """Say so if another execution provider ran the models than the one asked for."""
    if emission is not None:
        note = fallback_note({"dense": emission.latency}, provider)
        yield from [note] if note else []


def write_files(job: Job, program: Program, report: RunReport, folder: Path) -> list[str]:
    """Write the program, the recipe and the report beside model.onnx; returns all names."""
    serialize.save(program, folder / "model.pt2")
    if job.search is not None:
        (folder / FILE).write_text(json.dumps(job.search), encoding="utf-8")
    (folder / "recipe.toml").write_text(_recipe(job, report), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def _recipe(job: Job, report: RunReport) -> str:
    """Write how to get the result again, in the precision that was kept."""
    if job.choose_precision and report.precision is not None and report.precision.kept == "fp32":
        job = replace(job, pipeline=job.fp32_pipeline)
    options = job.options.recipe_fields()
    if job.targets and not any(PLAN in step.gives for step in job.pipeline):
        options["target"] = [str(target) for target in job.targets]
    return write_recipe(Recipe(job.pipeline, options))
