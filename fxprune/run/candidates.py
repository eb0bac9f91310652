"""The FP32 and the INT8 result of the passes, their measurements, and which one is kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fxprune.errors import FxpruneError
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.pipeline.driver import Entry, Pipeline
from fxprune.report.content import Check
from fxprune.report.precision import Figures, Precision
from fxprune.run.checkpoint import Checkpoint, Journal
from fxprune.run.checks import NOT_WANTED
from fxprune.run.job import Job
from fxprune.run.measure import Emission, Exported, export, time_files
from fxprune.run.quantized_checks import check_quantized
from fxprune.training.evaluate import Evaluation

log = logging.getLogger(__name__)

# The share of right predictions that INT8 may lose where FP32 could be kept instead.
MAX_INT8_LOSS = 0.005
Name = Literal["fp32", "int8"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A result of the passes, and the journal of the passes that made it."""

    program: Program
    journal: Journal


@dataclass(frozen=True, eq=False)
class Candidates:
    """The results that one may be chosen from.

    Attributes:
        by_name: FP32 is missing after a run was resumed behind its passes; INT8 is missing if it
            was not asked for or could not be made.
        obstacle: why there is no INT8, where it was wanted.
        failed: whether the obstacle is an error.

    """

    by_name: Mapping[Name, Candidate]
    obstacle: str | None = None
    failed: bool = False


@dataclass(frozen=True, eq=False)
class Measured:
    """A candidate's ONNX file.

    Attributes:
        program: what it was written from.
        journal: of the passes that made the program.
        emission: the file and its latency; None if there is no file.
        accuracy: of the file in ONNX Runtime; without one, of the program.
        checks: what an INT8 file was checked for.

    """

    program: Program
    journal: Journal
    emission: Emission | None
    accuracy: Evaluation
    checks: Mapping[str, Check] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measured candidates by name, the dense model's file, and why there is no INT8.

    ``failed`` is whether the obstacle is an error; ``no_file`` is why there are no ONNX files.
    """

    dense: Emission | None
    by_name: Mapping[Name, Measured]
    obstacle: str | None = None
    failed: bool = False
    no_file: str | None = None

    def kept(self, precision: Precision | None) -> Measured:
        """Return the candidate that was chosen; the only one if there was no choice."""
        return self.by_name[precision.kept if precision else "fp32"]


def run_passes(job: Job, checkpoint: Checkpoint) -> Candidates:
    """Run the passes, after those of the checkpoint if the run is resumed."""
    program, journal = _beginning(job, checkpoint)
    if len(journal.entries) > len(job.fp32_pipeline.passes):
        _advance(job, job.pipeline, program, journal, checkpoint)
        return Candidates({"int8": Candidate(program, journal)})
    _advance(job, job.fp32_pipeline, program, journal, checkpoint)
    fp32 = Candidate(program, journal)
    if job.fp32_pipeline == job.pipeline:
        return Candidates({"fp32": fp32})
    int8 = Candidate(program.copy(), copy.deepcopy(journal))
    kept = Checkpoint.none() if job.choose_precision else checkpoint
    try:
        _advance(job, job.pipeline, int8.program, int8.journal, kept)
    except Exception as error:  # whatever it is, the FP32 result is finished
        return _without_int8(fp32, "INT8 conversion failed", error)
    if is_quantized(int8.program):
        return Candidates({"fp32": fp32, "int8": int8})
    nothing = "no layer of this model can be quantised"
    return Candidates({"fp32": fp32 if job.choose_precision else int8}, nothing)


def _without_int8(fp32: Candidate, what: str, error: Exception) -> Candidates:
    log.debug(what, exc_info=error)
    reason = str(error).strip().split("\n\n")[0]
    if not isinstance(error, FxpruneError):
        first = reason.splitlines()[0] if reason else ""
        reason = f"unexpected {type(error).__name__}: {first}; please report it with the model"
    return Candidates({"fp32": fp32}, f"{what}: {reason}", failed=True)


def _beginning(job: Job, checkpoint: Checkpoint) -> tuple[Program, Journal]:
    """Return the dense program, or what a killed run has kept."""
    options = job.options
    kept = checkpoint.load() if options.resume else None
    if not options.resume:
        checkpoint.drop()
    if kept is None:
        return job.dense.copy().to(options.device), Journal()
    program, journal = kept
    done, total = len(journal.entries), len(job.pipeline.passes)
    options.progress.say(f"resuming after pass {done} of {total}")
    return program.to(options.device), journal


def _advance(
    job: Job, pipeline: Pipeline, program: Program, journal: Journal, checkpoint: Checkpoint
) -> None:
    """Run the passes of a pipeline that the journal does not have yet."""
    plan = program.facts.get(PLAN.name)

    def observe(program: Program, entry: Entry) -> None:
        nonlocal plan
        journal.add(pipeline.passes[len(journal.entries)], entry, program, plan)
        plan = program.facts.get(PLAN.name)
        job.options.progress.say(f"{entry.spec}: {entry.seconds:.1f} s")
        checkpoint.save(program, journal)

    pipeline.run(program, job.context, (observe,), done=tuple(journal.entries))


def measure_candidates(
    job: Job, candidates: Candidates, dense: Exported | None, folder: Path
) -> Measurements:
    """Export every candidate, and measure its latency and accuracy.

    An INT8 candidate that cannot be exported or run is dropped if there is an FP32 one. If that
    cannot be exported either, the result has no file, and ``no_file`` says why.

    Args:
        job: what the run works on.
        candidates: the results of the passes.
        dense: the dense model's file; None if no ONNX files are wanted.
        folder: for the files.

    """
    if dense is None:
        return _without_files(job, candidates, None, NOT_WANTED)
    job.options.progress.say("exporting to ONNX and measuring latency")
    try:
        return _measure(job, candidates, dense, folder / "all")
    except Exception as error:
        failure = error
    try:
        if set(candidates.by_name) == {"fp32", "int8"}:
            fp32 = candidates.by_name["fp32"]
            candidates = _without_int8(fp32, "INT8 cannot be exported or run", failure)
            return _measure(job, candidates, dense, folder / "fp32")
    except Exception as error:
        failure = error
    log.info("the result cannot be exported", exc_info=failure)
    own = isinstance(failure, FxpruneError)
    reason = str(failure) if own else f"{type(failure).__name__}: {failure}".splitlines()[0]
    return _without_files(job, candidates, dense, reason)


def _measure(job: Job, candidates: Candidates, dense: Exported, folder: Path) -> Measurements:
    files = {"dense": dense}
    for name, one in candidates.by_name.items():
        samples = () if name == "int8" else job.samples  # INT8 predictions are compared instead
        standard = job.options.standard_onnx
        files[name] = export(one.program, folder / name, samples, standard=standard)
    emitted = time_files(files, job.context, job.options.latency_seconds)
    measured = {
        name: Measured(
            one.program,
            one.journal,
            emitted[name],
            job.judge.file(emitted[name].path, f"evaluating the ONNX file, {name.upper()}"),
        )
        for name, one in candidates.by_name.items()
    }
    if (int8 := measured.get("int8")) is not None:
        checks = check_quantized(int8.program, emitted["int8"].path, job.data)
        measured["int8"] = replace(int8, checks=checks)
    return Measurements(emitted["dense"], measured, candidates.obstacle, candidates.failed)


def _without_files(
    job: Job, candidates: Candidates, dense: Exported | None, reason: str
) -> Measurements:
    """Measure the accuracy of one program, FP32 if there is one, in PyTorch."""
    name: Name = "fp32" if "fp32" in candidates.by_name else "int8"
    one = candidates.by_name[name]
    accuracy = job.judge.program(one.program, "evaluating the small model")
    emission = None
    if dense is not None:
        seconds = job.options.latency_seconds
        emission = time_files({"dense": dense}, job.context, seconds)["dense"]
    measured = Measured(one.program, one.journal, None, accuracy)
    obstacle = candidates.obstacle
    return Measurements(emission, {name: measured}, obstacle, candidates.failed, reason)


def select_precision(
    job: Job, measured: Measurements, dense_accuracy: Evaluation
) -> Precision | None:
    """Choose between FP32 and INT8; None if INT8 was never asked for."""
    drop, dense = job.options.max_drop, dense_accuracy.accuracy
    lowest = None if drop is None or dense is None else dense - drop / 100
    return choose(measured, free=job.choose_precision, min_accuracy=lowest)


def choose(measured: Measurements, *, free: bool, min_accuracy: float | None) -> Precision | None:
    """Choose between FP32 and INT8; None if INT8 was never asked for.

    Args:
        measured: the candidates with their measurements.
        free: whether FP32 is kept if INT8 is slower or less accurate; else INT8 if there is one.
        min_accuracy: the smallest accuracy that is allowed; None for no limit.

    """
    fp32, int8 = (measured.by_name.get(name) for name in ("fp32", "int8"))
    if int8 is None:
        return None if measured.obstacle is None else Precision("fp32", measured.obstacle)
    if fp32 is None:
        why = (
            "the run was resumed after its FP32 passes, so there is no FP32 result to compare with"
        )
        return Precision("int8", why, int8=_figures(int8))
    assert int8.emission is not None
    assert fp32.emission is not None
    speedup = int8.emission.latency.speedup / fp32.emission.latency.speedup
    figures = _figures(fp32), _figures(int8), speedup
    slow = None if speedup > 1 else f"INT8 is not faster than FP32 ({speedup:.2f}x)"
    reason = slow or _failed(int8) or _inaccurate(fp32.accuracy, int8.accuracy, min_accuracy)
    if free and reason is not None:
        return Precision("fp32", reason, *figures)
    why = f"as requested, although {slow}" if slow else f"{speedup:.2f}x as fast as FP32"
    return Precision("int8", why, *figures)


def _figures(one: Measured) -> Figures | None:
    emission = one.emission
    if emission is None:
        return None
    return Figures(emission.latency.median_ms, emission.export.onnx_bytes, one.accuracy.accuracy)


def _failed(int8: Measured) -> str | None:
    failed = [name for name, check in int8.checks.items() if check.passed is False]
    return f"INT8 failed the check {', '.join(failed)}" if failed else None


def _inaccurate(fp32: Evaluation, int8: Evaluation, min_accuracy: float | None) -> str | None:
    if fp32.accuracy is None or int8.accuracy is None:
        return None
    lost = fp32.accuracy - int8.accuracy
    reason = f"INT8 loses {100 * lost:.2f} percentage points more accuracy"
    if min_accuracy is not None:
        exceeds = int8.accuracy < min_accuracy <= fp32.accuracy
        return f"{reason}, which exceeds max-drop" if exceeds else None
    return reason if lost > MAX_INT8_LOSS + 1 / max(int8.predictions, 1) else None
