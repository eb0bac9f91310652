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

from fxprune.data.batches import batches
from fxprune.data.roles import Data, as_data, subset
from fxprune.errors import InputError
from fxprune.graph import serialize
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.pipeline.text import Recipe, write_recipe
from fxprune.report.content import RunReport
from fxprune.report.html import to_html
from fxprune.run.checkpoint import Checkpoint
from fxprune.run.checks import check_data
from fxprune.run.job import Job, aimed, fingerprint_of
from fxprune.run.options import Options, attention_of, make_options, resolve
from fxprune.run.output import staged
from fxprune.run.running import run
from fxprune.structure.groups import find_groups


@dataclass(frozen=True)
class Result:
    """What a run gives: the smaller program, the report, and where each file is, by name."""

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
    """Compile a model into a smaller one; the model itself is left as it was.

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
            groups = find_groups(program, attention_of(pipeline))
            job = aimed(Job(program, groups, samples, pipeline, targets, asked))
            kept = Checkpoint(folder, fingerprint_of(job), tuple(map(str, job.pipeline)))
            with _told(kept):
                small, report = run(job, kept if out else None, aside)
            report = replace(report, seconds=time.perf_counter() - start)
            serialize.save(small, aside / "model.pt2")
            (aside / "recipe.toml").write_text(_recipe(job, report), encoding="utf-8")
            (aside / "report.html").write_text(to_html(report), encoding="utf-8")
            (aside / "report.json").write_text(report.to_json(), encoding="utf-8")
            names = sorted(path.name for path in aside.iterdir())
        kept.drop()
    return Result(small, report, {name: folder / name for name in names} if out else {})


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


def _recipe(job: Job, report: RunReport) -> str:
    """Say how to come by the result again, in the form that was kept."""
    if job.free and report.precision is not None and report.precision.kept == "fp32":
        job = replace(job, pipeline=job.in_floats)
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
def _told(kept: Checkpoint) -> Iterator[None]:
    """Add to any failure that finished passes are kept."""
    try:
        yield
    except BaseException as error:
        if kept.state.exists():
            error.add_note("finished passes are kept; run again with --resume to go on from there")
        raise


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
