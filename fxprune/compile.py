"""The main job: a trained model in, a smaller one out, as ONNX, with a report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune import serialize
from fxprune.budget import Target
from fxprune.checkpoint import Checkpoint, Journal, fingerprint
from fxprune.checks import check_data, check_removal, result_checks
from fxprune.context import Context
from fxprune.data import Data, as_data, batches, subset
from fxprune.errors import InputError
from fxprune.evaluate import Evaluation
from fxprune.facts import PLAN
from fxprune.groups import Group, find_groups
from fxprune.measure import Judge, emit, measures
from fxprune.options import Options, make_options, resolve
from fxprune.output import staged
from fxprune.pipeline import Entry, Pipeline
from fxprune.pipeline_text import Recipe, write_recipe
from fxprune.program import Program
from fxprune.report import Check, GroupEntry, Measures, RunReport, TargetEntry, environment
from fxprune.report_html import to_html
from fxprune.trace import trace

TOLERANCE = 0.01  # a target is met within one per cent


@dataclass(frozen=True)
class Result:
    """What a run gives: the smaller program, the report, and where each file is, by name."""

    program: Program
    report: RunReport
    files: Mapping[str, Path]


@dataclass(frozen=True)
class _Job:
    """What a run works on: the dense program, where it began, and what is asked of it."""

    dense: Program
    groups: tuple[Group, ...]
    data: Data | None
    pipeline: Pipeline
    targets: tuple[Target, ...]
    options: Options


def compile(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    data: Any = None,
    target: str | Iterable[str] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Result:
    """Compile a model into a smaller one; the model itself is left as it was.

    Args:
        model: the trained model, or a program traced from one.
        example_inputs: inputs that run it; by default one sample of the data.
        data: what ``fxprune.data.as_data`` takes.
        target: ``macs=50%`` and the like, several joined by commas or in a list; half of the
            multiply-accumulates where neither this nor a pipeline is given.
        out: the folder for model.onnx, model.pt2, report.json, report.html and recipe.toml, which
            appear together at the end; None writes nothing.
        options: the fields of ``fxprune.options.Options``; ``pipeline`` may be text.

    Raises:
        InputError: the model, the data or the options cannot be used.
        FxpruneError: a pass or a check failed.

    """
    asked = make_options(target, **options)
    pipeline, targets = resolve(asked)
    samples = None if data is None else as_data(data, seed=asked.seed)
    start = time.perf_counter()
    with _settings(asked), _folder(out) as folder:
        with staged(folder) as aside:
            program = _program(model, example_inputs, samples)
            if samples is not None:
                check_data(samples, program)
                samples = _limited(samples, asked)
            job = _Job(program, find_groups(program), samples, pipeline, targets, asked)
            kept = Checkpoint(folder, _fingerprint(job))
            small, report = _run(job, kept if out else None, aside)
            report = replace(report, seconds=time.perf_counter() - start)
            serialize.save(small, aside / "model.pt2")
            (aside / "recipe.toml").write_text(_recipe(job), encoding="utf-8")
            (aside / "report.html").write_text(to_html(report), encoding="utf-8")
            (aside / "report.json").write_text(report.to_json(), encoding="utf-8")
            names = sorted(path.name for path in aside.iterdir())
        kept.drop()
    return Result(small, report, {name: folder / name for name in names} if out else {})


def _run(job: _Job, kept: Checkpoint | None, aside: Path) -> tuple[Program, RunReport]:
    options, dense, say = job.options, job.dense, job.options.progress.say
    checks = {"zero_then_remove": Check.skipped("--no-verify was given")}
    if options.verify:
        say("checking that removal is exact (zero-then-remove)")
        checks["zero_then_remove"] = check_removal(dense, job.groups, options.seed)
    judge = Judge(
        job.data, dense, options.batch_size, options.device, options.threads, options.progress
    )
    before = judge.program(dense, "evaluating the dense model")
    small, journal = _optimise(job, kept)
    after = judge.program(small, "evaluating the small model")
    dense.to("cpu").eval(), small.to("cpu").eval()
    say("exporting to ONNX and measuring latency")
    emission = emit(dense, small, aside / "model.onnx", options.threads or 1)
    in_file = judge.file(aside / "model.onnx", "evaluating the ONNX file")
    checks |= result_checks(emission.small, before, after, in_file, options.max_drop)
    latency = emission.latency
    large = measures(dense, emission.dense, latency["before"], before)
    little = measures(small, emission.small, latency["after"], in_file)
    return small, RunReport(
        large,
        little,
        tuple(_target(target, large, little) for target in job.targets),
        tuple(journal.entries),
        checks,
        tuple(_group(group, journal) for group in job.groups),
        environment(options.device, options.seed, options.threads or 1),
        _notes(job, journal, before),
        journal.curves,
        emission.speedup,
    )


def _optimise(job: _Job, kept: Checkpoint | None) -> tuple[Program, Journal]:
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

    context = Context(
        job.data, options.device, options.seed, options.loss, job.dense, options.progress
    )
    job.pipeline.run(program, context, (observe,), done=tuple(journal.entries))
    return program, journal


def _program(
    model: nn.Module | Program, example_inputs: tuple[Any, ...] | None, data: Data | None
) -> Program:
    if isinstance(model, Program):
        return model.copy().eval()
    if example_inputs is None:
        if data is None:
            raise InputError("there are neither data nor example inputs to trace the model with")
        example_inputs = next(batches(data.calibration, 1)).inputs
    return trace(model, example_inputs)


def _limited(data: Data, options: Options) -> Data:
    count = options.calibration
    if count is None or count >= len(data.calibration):
        return data
    return replace(data, calibration=subset(data.calibration, count, options.seed))


def _fingerprint(job: _Job) -> str:
    sizes = [f"{role}={len(samples)}" for role, samples in job.data.roles()] if job.data else []
    options = (job.pipeline, job.options.seed, job.options.device, *sizes)
    return fingerprint(job.dense, options)


def _target(target: Target, before: Measures, after: Measures) -> TargetEntry:
    dense, value = getattr(before, target.quantity), getattr(after, target.quantity)
    limit = target.limit(dense)
    return TargetEntry(str(target), limit, value, value <= (1 + TOLERANCE) * limit)


def _group(group: Group, journal: Journal) -> GroupEntry:
    return GroupEntry(
        group.name,
        tuple(map(str, group.slots)),
        len(group.units),
        journal.removed.get(group.name, 0),
        journal.implanted.get(group.name, 0),
        group.frozen_because,
    )


def _notes(job: _Job, journal: Journal, before: Evaluation) -> tuple[str, ...]:
    notes = list(job.data.notes) if job.data else []
    notes += [before.note] if before.note else []
    for entry in journal.entries:
        notes += (entry.outcome.details or {}).get("notes", [])
    return tuple(notes)


def _recipe(job: _Job) -> str:
    planned = any(PLAN in step.gives for step in job.pipeline)
    options = job.options.told()
    if job.targets and not planned:
        options["target"] = [str(target) for target in job.targets]
    return write_recipe(Recipe(job.pipeline, options))


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        yield Path(scratch)


@contextmanager
def _settings(options: Options) -> Iterator[None]:
    """Seed PyTorch and set its threads for the run, and put both back."""
    threads = torch.get_num_threads()
    cuda = options.device.startswith("cuda")
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []):
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
