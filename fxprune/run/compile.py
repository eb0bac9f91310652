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

from fxprune.graph.facts import MASKS
from fxprune.graph.program import Program
from fxprune.onnx.quantized_nodes import is_quantized
from fxprune.report.content import Check, RunReport
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
    check_masks,
    check_removal,
    result_checks,
)
from fxprune.run.job import Job, checkpoint_of, make_job, with_searched_targets
from fxprune.run.options import Options, make_options
from fxprune.run.output import staged
from fxprune.run.reporting import make_report, write_files
from fxprune.training.evaluate import Evaluation


@dataclass(frozen=True)
class Result:
    """What a run returns: the smaller program, the report, and where each file is, by name."""

    program: Program
    report: RunReport
    files: Mapping[str, Path]


def compile(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    data: Any = None,
    target: str | Iterable[str] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Result:
    """Compile a model into a smaller one; the model itself is not changed.

    Args:
        model: the trained model, or a program traced from one.
        example_inputs: inputs that run it; by default one sample of the data.
        data: what ``fxprune.data.roles.as_data`` takes.
        target: ``macs=50%`` and the like, several joined by commas or in a list; half of the
            multiply-accumulates where neither this, a pipeline nor ``max_drop`` is given.
        out: the folder for model.onnx, model.pt2, report.json, report.html and recipe.toml, which
            appear together at the end; None writes nothing.
        options: the fields of ``fxprune.run.options.Options``; ``pipeline`` may be text.

    Raises:
        InputError: the model, the data or the options cannot be used.
        FxpruneError: a pass or a check failed.

    """
    return _run(model, example_inputs, data, out, make_options(target, **options))


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
            job = with_searched_targets(make_job(model, example_inputs, data, options))
            checkpoint = checkpoint_of(job, folder if out else None)
            with resumable(checkpoint), tempfile.TemporaryDirectory(dir=staging) as scratch:
                checks = _check_before(job)
                accuracy = job.judge.program(job.dense, "evaluating the dense model")
                candidates = run_passes(job, checkpoint)
                measured = measure_candidates(job, candidates, Path(scratch))
                precision = select_precision(job, measured, accuracy)
                chosen = measured.kept(precision)
                chosen.emission.move_to(staging)
                checks |= _check_after(job, chosen, accuracy, staging / "model.onnx")
                checks |= _check_int8(job, measured)
            report = make_report(job, measured, precision, accuracy, checks)
            report = replace(report, seconds=time.perf_counter() - start)
            names = write_files(job, chosen.program, report, staging)
        checkpoint.drop()
    return Result(chosen.program, report, {name: folder / name for name in names} if out else {})


def _check_before(job: Job) -> dict[str, Check]:
    """Check that removal is exact before anything is removed."""
    if not job.options.verify:
        return {"zero_then_remove": Check.skipped("--no-verify was given")}
    job.options.progress.say("checking that removal is exact (zero-then-remove)")
    return {"zero_then_remove": check_removal(job.dense, job.groups, job.options.seed)}


def _check_after(job: Job, chosen: Measured, before: Evaluation, path: Path) -> dict[str, Check]:
    """Check the file that was chosen against its program and the dense model."""
    after = job.judge.program(chosen.program, "evaluating the small model")
    program = chosen.program.to("cpu").eval()
    in_file = chosen.accuracy
    limit = accuracy_limit(chosen.checks) if is_quantized(program) else ACCURACY_LIMIT
    checks = result_checks(
        chosen.emission.export, before, after, in_file, job.options.max_drop, limit
    )
    masks = {"masks": check_masks(program, path)} if MASKS.name in program.facts else {}
    return {**checks, **masks, **chosen.checks}


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
