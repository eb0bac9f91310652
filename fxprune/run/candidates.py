"""The result in floats and in 8-bit codes: both are made and measured, and one is kept."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.onnx import OnnxExporterError

from fxprune.errors import FxpruneError
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.pipeline.driver import Entry, Pipeline
from fxprune.report.content import Check
from fxprune.report.precision import Figures, Precision
from fxprune.run.checkpoint import Checkpoint, Journal
from fxprune.run.job import Job
from fxprune.run.measure import Emission, emit
from fxprune.run.quantized_checks import check_quantized
from fxprune.training.evaluate import Evaluation

LOSS = 0.005  # the share of right predictions that codes may cost, where floats are an alternative


@dataclass(frozen=True, eq=False)
class Forms:
    """The result of the passes in floats and in codes.

    Attributes:
        floats: None if only codes are left, as when a run resumed behind the floats.
        codes: None if they were not asked for, or cannot be had.
        obstacle: why there are no codes, where they were wanted.
        free: whether the better one is taken; else codes, where there are any.

    """

    floats: Program | None
    codes: Program | None = None
    obstacle: str | None = None
    free: bool = False

    @property
    def programs(self) -> dict[str, Program]:
        """Those that there are, by name."""
        found = {"fp32": self.floats, "int8": self.codes}
        return {name: program for name, program in found.items() if program is not None}


def emit_forms(job: Job, forms: Forms, folder: Path) -> tuple[Forms, dict[str, Emission]]:
    """Write the dense program and the result's forms; codes only if they can be had."""
    threads, seconds = job.options.threads or 1, job.options.latency_seconds
    for program in forms.programs.values():
        program.to("cpu").eval()
    try:
        return forms, emit({"dense": job.dense, **forms.programs}, folder / "all", threads, seconds)
    except (FxpruneError, OnnxExporterError) as error:
        if forms.codes is None or not forms.free:
            raise
        reason = f"for INT8 cannot be exported: {str(error).splitlines()[0]}"
        forms = replace(forms, codes=None, obstacle=reason)
    return forms, emit({"dense": job.dense, **forms.programs}, folder / "floats", threads, seconds)


def optimise(job: Job, kept: Checkpoint | None) -> tuple[Forms, dict[str, Journal]]:
    """Run the passes, from the checkpoint on if that is asked for; one journal per form."""
    program, journal = _begun(job, kept)
    floats = job.in_floats
    if len(journal.entries) > len(floats.passes):
        _advance(job, job.pipeline, program, journal, kept)
        return Forms(None, program), {"int8": journal}
    _advance(job, floats, program, journal, kept)
    journals = {"fp32": journal, "int8": copy.deepcopy(journal)}
    if floats == job.pipeline:
        return Forms(program), journals
    codes, obstacle = program.copy(), None
    try:
        _advance(job, job.pipeline, codes, journals["int8"], None if job.free else kept)
    except FxpruneError as error:
        if not job.free:
            raise
        obstacle = f"for INT8 cannot be had: {error}"
    if obstacle is None and not is_quantized(codes):
        obstacle = "for nothing in this model can be quantised"
        if not job.free:
            return Forms(codes, None, obstacle), {"fp32": journals["int8"]}
    return Forms(program, None if obstacle else codes, obstacle, job.free), journals


def _begun(job: Job, kept: Checkpoint | None) -> tuple[Program, Journal]:
    """Return the dense program, or what a run that was killed left of it."""
    options = job.options
    found = kept.load() if kept and options.resume else None
    if kept and not options.resume:
        kept.drop()
    if found is None:
        return job.dense.copy().to(options.device), Journal()
    program, journal = found
    options.progress.say(
        f"resuming after pass {len(journal.entries)} of {len(job.pipeline.passes)}"
    )
    return program.to(options.device), journal


def _advance(
    job: Job, pipeline: Pipeline, program: Program, journal: Journal, kept: Checkpoint | None
) -> None:
    """Run the passes of a pipeline that a journal does not have yet."""
    plan = program.facts.get(PLAN.name)

    def observe(program: Program, entry: Entry) -> None:
        nonlocal plan
        journal.add(pipeline.passes[len(journal.entries)], entry, program, plan)
        plan = program.facts.get(PLAN.name)
        job.options.progress.say(f"{entry.spec}: {entry.seconds:.1f} s")
        if kept:
            kept.save(program, journal)

    pipeline.run(program, job.context, (observe,), done=tuple(journal.entries))


@dataclass(frozen=True, eq=False)
class Settled:
    """The form that was kept.

    Attributes:
        program: it.
        journal: of the passes that led to it.
        dense: the dense model's file, which is gone.
        emission: its own.
        judged: the accuracy of its file.
        checks: what codes were checked for.
        precision: why this one; None where there was no choice.

    """

    program: Program
    journal: Journal
    dense: Emission
    emission: Emission
    judged: Evaluation
    checks: Mapping[str, Check]
    precision: Precision | None


def settle(job: Job, kept: Checkpoint | None, before: Evaluation, aside: Path) -> Settled:
    """Run the passes, measure the result in every form, and put the best one's file aside.

    Args:
        job: what to do.
        kept: the checkpoint.
        before: the dense model's accuracy.
        aside: the folder for ``model.onnx``.

    """
    forms, journals = optimise(job, kept)
    job.dense.to("cpu").eval()
    job.options.progress.say("exporting to ONNX and measuring latency")
    with tempfile.TemporaryDirectory(prefix="fxprune-", dir=aside) as scratch:
        forms, emitted = emit_forms(job, forms, Path(scratch))
        dense = emitted.pop("dense")
        judged = {
            name: job.judge.file(one.path, f"evaluating the ONNX file, {name.upper()}")
            for name, one in emitted.items()
        }
        checks: dict[str, Check] = {}
        if forms.codes is not None:
            checks = check_quantized(forms.codes, emitted["int8"].path, job.data)
        failed = [name for name, check in checks.items() if check.passed is False]
        least = _least(before, job.options.max_drop)
        precision = choose(forms, emitted, judged, failed, least)
        name = precision.kept if precision else "fp32"
        for part in emitted[name].path.parent.iterdir():
            part.replace(aside / part.name)
    return Settled(
        forms.programs[name], journals[name], dense, emitted[name], judged[name],
        checks if name == "int8" else {}, precision,
    )  # fmt: skip


def choose(
    forms: Forms,
    emitted: Mapping[str, Emission],
    judged: Mapping[str, Evaluation],
    failed: Sequence[str],
    least: float | None,
) -> Precision | None:
    """Choose a form; None where codes were never in question.

    Args:
        forms: what there is to choose from.
        emitted: by form, its file, with latencies of one run.
        judged: by form, the accuracy of its file.
        failed: the checks that codes failed.
        least: the smallest accuracy that is allowed.

    """
    if "int8" not in emitted:
        return None if forms.obstacle is None else Precision("fp32", forms.obstacle)
    figures = {
        name: Figures(one.latency.median_ms, one.export.onnx_bytes, judged[name].accuracy)
        for name, one in emitted.items()
    }
    if "fp32" not in emitted:
        why = "not set beside FP32, for the run resumed behind it"
        return Precision("int8", why, int8=figures["int8"])
    speedup = emitted["int8"].latency.speedup / emitted["fp32"].latency.speedup
    both = figures["fp32"], figures["int8"], speedup
    slow = None if speedup > 1 else "INT8 is not faster than FP32"
    broken = f"INT8 failed the checks {', '.join(failed)}" if failed else None
    reason = slow or broken or _inaccurate(judged, least)
    if forms.free and reason is not None:
        return Precision("fp32", f"for {reason} ({speedup:.2f}x)", *both)
    pace = f"{speedup:.2f}x as fast as FP32"
    return Precision("int8", f"although it is NOT FASTER: {pace}" if slow else pace, *both)


def _least(before: Evaluation, max_drop: float | None) -> float | None:
    if before.accuracy is None or max_drop is None:
        return None
    return before.accuracy - max_drop / 100


def _inaccurate(judged: Mapping[str, Evaluation], least: float | None) -> str | None:
    floats, codes = judged["fp32"], judged["int8"]
    if floats.accuracy is None or codes.accuracy is None:
        return None
    lost = floats.accuracy - codes.accuracy
    if least is not None and codes.accuracy < least <= floats.accuracy:
        return f"INT8 loses {100 * lost:.2f} points more, beyond max-drop"
    if lost > LOSS + 1 / max(codes.predictions, 1):
        return f"INT8 loses {100 * lost:.2f} points more"
    return None
