"""The main job, from the request to the files: a trained model in, a smaller ONNX model out."""

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
from torch.nn import functional as F

from fxprune.graph.facts import MASKS, Preference
from fxprune.graph.notebook import html_table
from fxprune.graph.program import Program
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.onnx.random_draws import draws
from fxprune.pipeline.context import Loss
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.progress import Tracker
from fxprune.report.content import Check, RunReport
from fxprune.report.table import rows
from fxprune.run.arguments import checked
from fxprune.run.candidates import (
    Measured,
    Measurements,
    measure_candidates,
    run_passes,
    select_precision,
)
from fxprune.run.checkpoint import resumable
from fxprune.run.checks import (
    ACCURACY_LIMIT,
    accuracy_limit,
    check_finite_outputs,
    check_masks,
    check_removal,
    checks_without_file,
    result_checks,
)
from fxprune.run.domination import better_without_pruning
from fxprune.run.frontier import parse_factors, write_points
from fxprune.run.job import Job, checkpoint_of, make_job, with_searched_targets
from fxprune.run.measure import Exported, export
from fxprune.run.options import Objective, Options, make_options
from fxprune.run.output import staged
from fxprune.run.planned import attempts, keeps_promise, with_searched_plan
from fxprune.run.reporting import make_report, write_files
from fxprune.training.evaluate import Evaluation


@dataclass(frozen=True, repr=False)
class Result:
    """What a run returns: the smaller program, the report, and where each file is, by name."""

    program: Program
    report: RunReport
    files: Mapping[str, Path]

    def __repr__(self) -> str:
        return f"Result({self.report.summary})"

    def _repr_html_(self) -> str:
        columns = ("", "before", "after", "")
        return html_table(self.report.verdict, columns, rows(self.report))


@checked
def compile(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    data: Any = None,
    target: str | Iterable[str] | None = None,
    max_drop: float | None = Options.max_drop,
    objective: Objective = Options.objective,
    search_minutes: float = Options.search_minutes,
    frontier: str | Iterable[str] | None = None,
    epochs: int = Options.epochs,
    steps: int = Options.steps,
    attention: Preference = Options.attention,
    int8: bool | None = Options.int8,
    standard_onnx: bool = Options.standard_onnx,
    pipeline: Pipeline | str | None = Options.pipeline,
    out: str | Path | None = None,
    resume: bool = Options.resume,
    calibration: int | None = Options.calibration,
    batch_size: int = Options.batch_size,
    seed: int = Options.seed,
    device: str = Options.device,
    threads: int | None = Options.threads,
    provider: str = Options.provider,
    latency_table: str | Path | None = Options.latency_table,
    latency_shape: str | Iterable[str] | None = None,
    verify: bool = Options.verify,
    onnx: bool = Options.onnx,
    latency_seconds: float = Options.latency_seconds,
    loss: Loss = F.cross_entropy,
    progress: Tracker | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Result:
    """Compile a model into a smaller one; the model itself is not changed.

    Args:
        model: the trained model, or a program traced from one.
        example_inputs: a tuple of inputs that run the model; by default one sample of the data.
        data: a dataset, a loader, a pair of tensors ``(x, y)``, a ``Data``, or a mapping with
            ``calibration``, ``train`` and ``eval`` to such.
        target: upper limits, such as ``macs=50%`` or ``latency=60%,size=1MB``, or a list of such
            texts. Without it and without a pipeline, the fastest model within ``max_drop``.
        max_drop: largest accuracy loss allowed, in percentage points; 1 in a search.
        objective: what a search without ``target`` minimizes: ``latency``, ``size``, ``macs`` or
            ``params``.
        search_minutes: how long a search may take, in minutes.
        frontier: speed-ups over the dense model, such as ``1.5x,2x,3x``, at which further models
            are written into ``points/`` of ``out``; needs a search.
        epochs: of fine-tuning, over the training samples.
        steps: number of pruning rounds; the epochs are divided among them.
        attention: remove whole heads, or narrow every head.
        int8: True quantizes to INT8, False keeps FP32; None keeps the better of the two.
        standard_onnx: write operators of the ONNX standard only, not faster ones of ONNX Runtime.
        pipeline: passes of your own, as a ``Pipeline`` or as text.
        out: the folder for model.onnx, model.pt2, report.json, report.html and recipe.toml, which
            appear together at the end; None writes nothing.
        resume: continue after the last finished pass of a run into ``out`` that was killed.
        calibration: largest number of calibration samples; None for all.
        batch_size: samples per step when accuracy is measured.
        seed: of all randomness.
        device: where the passes run the model, such as ``cuda``.
        threads: of PyTorch and ONNX Runtime; None leaves PyTorch's, and measures latency on one.
        provider: execution provider of ONNX Runtime that latency is measured with.
        latency_table: plan for the machine on which a kit of ``fxprune latency kit`` wrote this
            file; None plans for this host.
        latency_shape: shapes of inputs at which latency is measured, the size of the batch first,
            such as ``input_ids=1x26``, or a list of such texts.
        verify: check on random units that removing them equals zeroing them.
        onnx: False writes no model.onnx, and neither compares nor times in ONNX Runtime.
        latency_seconds: how long the latency of the results is measured, in seconds.
        loss: ``loss(outputs, target) -> scalar``, for training and sensitivities.
        progress: how progress is shown; by default a bar on a terminal.
        origin: further entries of the recipe's ``[run]``, such as the model's file.

    Raises:
        InputError: the model, the data or the options cannot be used.
        FxpruneError: a pass or a check failed.

    """
    shapes = latency_shape or ()
    options = make_options(
        target,
        pipeline,
        max_drop=max_drop,
        objective=objective,
        search_minutes=search_minutes,
        frontier=() if frontier is None else parse_factors(frontier),
        epochs=epochs,
        steps=steps,
        attention=attention,
        int8=int8,
        standard_onnx=standard_onnx,
        resume=resume,
        calibration=calibration,
        batch_size=batch_size,
        seed=seed,
        device=device,
        threads=threads,
        provider=provider,
        latency_table=None if latency_table is None else Path(latency_table),
        latency_shape=(shapes,) if isinstance(shapes, str) else tuple(shapes),
        verify=verify,
        onnx=onnx,
        latency_seconds=latency_seconds,
        loss=loss,
        progress=progress or Tracker(),
        origin=origin or {},
    )
    return _run(model, example_inputs, data, out, options)


def _run(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None,
    data: Any,
    out: str | Path | None,
    options: Options,
) -> Result:
    """Do everything that a compile does, in this order."""
    start = time.perf_counter()
    with _seeded(options), _output_folder(out) as folder:
        with staged(folder) as staging:
            with tempfile.TemporaryDirectory(dir=staging) as scratch:
                job = make_job(model, example_inputs, data, options)
                dense = _export_dense(job, Path(scratch))
                job, checks = _check_before(job)
                job = with_searched_targets(job)
                accuracy = job.judge.program(job.dense, "evaluating the dense model")
                asked = with_searched_plan(job)
                for number, job in enumerate(attempts(asked)):
                    checkpoint = checkpoint_of(job, folder if out else None)
                    with resumable(checkpoint):
                        candidates = run_passes(job, checkpoint)
                        place = Path(scratch, str(number))
                        measured = measure_candidates(job, candidates, dense, place)
                        precision = select_precision(job, measured, accuracy)
                        chosen = measured.kept(precision)
                    if not job.alternatives or keeps_promise(job, accuracy, chosen.accuracy):
                        break
                checks |= _check_after(job, chosen, accuracy, measured.no_file)
                notes = better_without_pruning(job, measured, chosen, Path(scratch))
                checks |= _check_int8(job, measured)
                frontier = write_points(job, accuracy, dense, staging)
                if chosen.emission is not None:
                    chosen.emission.move_to(staging)
            report = make_report(job, measured, precision, accuracy, checks, frontier)
            report = replace(
                report, notes=(*report.notes, *notes), seconds=time.perf_counter() - start
            )
            names = write_files(job, chosen.program, report, staging)
        checkpoint.drop()
    return Result(chosen.program, report, {name: folder / name for name in names} if out else {})


def _export_dense(job: Job, folder: Path) -> Exported | None:
    """Export the dense model before anything else, so that what cannot work fails at once."""
    if not job.options.onnx:
        return None
    job.options.progress.say("exporting the dense model and comparing it in ONNX Runtime")
    standard = job.options.standard_onnx
    return export(job.dense, folder / "dense", job.samples, standard=standard)


def _check_before(job: Job) -> tuple[Job, dict[str, Check]]:
    """Check that removal is exact before anything is removed; groups that fail are frozen."""
    if not job.options.verify:
        return job, {"zero_then_remove": Check.skipped("--no-verify was given")}
    job.options.progress.say("checking that removal is exact (zero-then-remove)")
    check, failing = check_removal(job.dense, job.groups, job.options.seed, job.samples)
    for group, why in failing.items():
        job.options.progress.note(f"{group.name} keeps its shape: {why}; please report it")
    return job.without(failing), {"zero_then_remove": check}


def _check_after(
    job: Job, chosen: Measured, before: Evaluation, no_file: str | None
) -> dict[str, Check]:
    """Check the file that was chosen against its program, and both against the dense model."""
    after = job.judge.program(chosen.program, "evaluating the small model")
    program = chosen.program.to("cpu").eval()
    checks = {"finite_outputs": check_finite_outputs(job.dense.to("cpu"), program, job.samples)}
    drop = job.options.max_drop
    if chosen.emission is None:
        return checks | checks_without_file(no_file or "", before, after, drop)
    random = bool(draws(program))
    limit = accuracy_limit(chosen.checks) if is_quantized(program) else ACCURACY_LIMIT
    checks |= result_checks(
        chosen.emission.export, before, after, chosen.accuracy, drop, limit, random=random
    )
    if MASKS.name in program.facts:
        checks["masks"] = check_masks(program, chosen.emission.path)
    return {**checks, **chosen.checks}


def _check_int8(job: Job, measured: Measurements) -> dict[str, Check]:
    """Fail where INT8 was asked for and an error prevented it; the FP32 result is written."""
    if job.choose_precision or not measured.failed:
        return {}
    return {"int8": Check(True, False, note=measured.obstacle)}


@contextmanager
def _output_folder(out: str | Path | None) -> Iterator[Path]:
    """Yield the folder for the results; a temporary one if none is given."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        yield Path(scratch)


@contextmanager
def _seeded(options: Options) -> Iterator[None]:
    """Seed PyTorch and set its threads for the run, and restore both afterwards."""
    threads = torch.get_num_threads()
    cuda = options.device.startswith("cuda")
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []):
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
