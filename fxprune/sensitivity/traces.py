"""Relative traces: probes, round by round, until the ranking at the cut has settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.errors import FxpruneError, InputError
from fxprune.sensitivity.exact import exact_trace, singles
from fxprune.sensitivity.model import Weights, traced_output
from fxprune.sensitivity.probes import TraceProbes, piecewise_linear
from fxprune.sensitivity.running_stats import Tally
from fxprune.sensitivity.task import Details, Measured, Task

FEW = 128  # outputs per sample up to which differentiating each is cheaper than probing
TOGETHER = 16  # samples that share a probe of the outputs on a CPU: more do not run much faster
# there, but each pair of samples that share a probe adds to its variance


def trace_scores(task: Task) -> Measured:
    """Score by relative traces, ``Tr(H_uu) / (2 |u|) ||w_u||^2``."""
    layout = task.layout
    squares = {name: task.program.tensor(name).detach().square() for name in layout.labels}
    factor = layout.sums(squares) / layout.counts(task.program) / 2
    probes, columns = _trace_probes(task)
    method = task.settings.estimator
    if method == "auto" and probes.outputs and 0 < columns <= FEW:
        method = "exact"
    return (_exact if method == "exact" else _probed)(task, probes, factor)


def _exact(task: Task, probes: TraceProbes, factor: Tensor) -> Measured:
    """Differentiate every output of every sample: no probes, and no error but the data's."""
    tally = Tally(len(factor))
    stream = (one for batch in task.batches() for one in singles(batch))
    total = min(task.settings.samples, len(task.context.samples.calibration))
    for sample in task.context.progress.track(stream, task.settings.criterion, total):
        tally.add(exact_trace(probes, sample))
    if not tally.count:
        raise FxpruneError(_no_result("samples", tally.dropped, task.settings.precision))
    details: Details = {
        "method": "exact",
        "probes": 0,
        "samples": tally.count,
        "dropped_samples": tally.dropped,
        "negative_traces": 0,
        "error_of": "samples",
    }
    return Measured(tally.mean * factor, tally.error * factor, details)


def _probed(task: Task, probes: TraceProbes, factor: Tensor) -> Measured:
    """Probe, round by round, until the ranking at the cut has settled."""
    settings, tally = task.settings, Tally(len(factor))
    treat: Callable[[Tensor], Tensor] = (
        torch.abs if settings.negative == "abs" else lambda trace: trace.clamp(min=0)
    )
    round_number, made = 0, 0
    while size := settings.rule.next_round(made):
        samples, probes = _round(task, probes, size, round_number)
        for sample in samples:
            tally.add(sample)
        made, round_number = made + size, round_number + 1
        scores, errors = treat(tally.mean) * factor, tally.error * factor
        if settings.rule.settled(scores, errors, tally.count):
            break
    if not tally.count:
        raise FxpruneError(_no_result("probes", tally.dropped, settings.precision))
    details: Details = {
        "method": "outputs" if probes.outputs else "weights",
        "probes": tally.count,
        "dropped_probes": tally.dropped,
        "negative_traces": int((tally.mean < 0).sum()),
        "error_of": "probes",
        "settled": str(settings.rule.settled(scores, errors, tally.count)).lower(),
        "wrong_share_of_cut": settings.rule.wrong_share(scores, errors),
    }
    return Measured(scores, errors, details)


def _no_result(what: str, dropped: int, precision: str) -> str:
    return f"none of {dropped} {what} was finite in {precision}; use precision=bf16 or fp32"


def _trace_probes(task: Task) -> tuple[TraceProbes, int]:
    """Choose what to probe; also return the outputs per sample, or 0 where they are not a row."""
    settings, objective = task.settings, task.objective()
    matrix: Literal["hessian", "gauss-newton"] = (
        "hessian" if settings.criterion == "hessian-trace" else "gauss-newton"
    )
    single = traced_output(task.program)
    rooted = objective.kind != "other" and single is not None
    able = rooted and (matrix == "gauss-newton" or piecewise_linear(task.program))
    row = single is not None and single.dim() == 2 and bool(task.program.dynamic)
    columns = single.shape[1] if single is not None and row else 0
    if settings.estimator == "exact" and not columns:
        raise InputError(
            "estimator=exact takes a model of any batch size with one row of outputs per sample; "
            "use estimator=outputs"
        )
    if settings.estimator in ("outputs", "exact") and not able:
        raise InputError(
            f"estimator={settings.estimator} cannot give the {settings.criterion}: it takes "
            "cross-entropy or a squared error on one output, and for the Hessian a network that is "
            "piecewise linear in each weight; use estimator=weights"
        )
    probes = TraceProbes(
        task.program,
        task.layout,
        Weights.of(task.program, list(task.layout.labels)),
        objective,
        matrix,
        able and settings.estimator != "weights",
        settings.precision,
        2.0**12 if settings.precision == "fp16" else 1.0,
    )
    return probes, columns


def _round(task: Task, probes: TraceProbes, size: int, number: int) -> tuple[Tensor, TraceProbes]:
    """Make ``size`` probes on every batch; the loss scale halves where one was not finite."""
    total = torch.zeros(size, len(task.layout), dtype=torch.float64)
    seen = 0
    free = task.settings.estimator == "auto" and probes.outputs and task.context.device == "cpu"
    batches = task.batches(TOGETHER if free else None)
    stream = task.context.progress.track(batches, f"probing, round {number + 1}")
    for position, batch in enumerate(stream):
        generator = torch.Generator().manual_seed(
            task.context.seed * 1_000_003 + number * 10_007 + position
        )
        sample = probes.prepare(batch, generator)
        made = torch.stack([sample(_signs(generator)) for _ in range(size)])
        total += made * len(batch)
        seen += len(batch)
        if not bool(made.isfinite().all()) and probes.scale > 1:
            probes = replace(probes, scale=probes.scale / 16)
    if not seen:
        raise InputError("there are fewer calibration samples than the model's fixed batch size")
    return total / seen, probes


def _signs(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def signs(like: Tensor) -> Tensor:
        drawn = torch.randint(2, like.shape, generator=generator) * 2 - 1
        return drawn.to(like.device, like.dtype)

    return signs
