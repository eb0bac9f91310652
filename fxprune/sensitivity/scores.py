"""Sensitivity: how much the loss rises if a unit goes, by one of several criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fxprune.errors import FxpruneError
from fxprune.graph.facts import Sensitivity
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.sensitivity.gate_scores import GateProbes
from fxprune.sensitivity.gates import GatedProgram
from fxprune.sensitivity.heuristics import activation, magnitude, norm_scale, without
from fxprune.sensitivity.model import lacks_derivative, traced_output
from fxprune.sensitivity.running_stats import Tally, misplaced
from fxprune.sensitivity.task import Criterion, Details, Measured, SensitivitySettings, Task
from fxprune.sensitivity.traces import trace_scores
from fxprune.sensitivity.units import UnitLayout
from fxprune.structure.groups import Group

_BY_GATES = ("taylor", "fisher", "gauss-newton", "output-shift")  # from first derivatives
__all__ = ["Criterion", "SensitivitySettings", "measure"]


def measure(
    program: Program, groups: Sequence[Group], settings: SensitivitySettings, context: Context
) -> tuple[Sensitivity, UnitLayout, Mapping[str, str]]:
    """Score every unit of every removable group.

    Args:
        program: the program that the groups were found in; left as it is.
        groups: frozen ones are passed over.
        settings: the criterion and its options.
        context: data, loss, device, seed, progress.

    Returns:
        The scores, the layout of the units, and the groups without a score, with the reason. Where
        ``gauss-newton`` does not apply, or an operator has no derivative, the scores are those of
        the nearest criterion that applies; the details say why.

    Raises:
        InputError: the criterion cannot be had for this loss, data or precision.
        FxpruneError: no probe was finite, or an operator lacks a second derivative.

    """
    layout = UnitLayout.of(program, groups)
    if not len(layout):
        return Sensitivity(settings.criterion, {}), layout, {}
    work = program.copy().eval().to(context.device)
    task = Task(work, layout, settings, context)
    asked = settings.criterion
    nearest, why = _nearest(task)
    settings = replace(settings, criterion=nearest)
    try:
        measured = _measure(replace(task, settings=settings))
    except (RuntimeError, NotImplementedError) as error:
        if settings.criterion not in _BY_GATES or not lacks_derivative(error):
            raise
        nearest = "activation"
        why = f"an operator of the model has no derivative: {str(error).splitlines()[0]}"
        measured = _measure(replace(task, settings=replace(settings, criterion=nearest)))
    skipped = measured.skipped or {}
    parts = layout.split(measured.scores)
    errors = {} if measured.errors is None else layout.split(measured.errors)
    details: Details = {"units": len(layout), **(measured.details or {})}
    if why is not None:
        note = f"used the criterion {nearest} instead of {asked}: {why}"
        details |= {"criterion": nearest, "note": note}
    if measured.errors is not None:
        details["expected_misplaced"] = misplaced(
            measured.scores, measured.errors, settings.rule.cut
        )
    sensitivity = Sensitivity(
        settings.criterion,
        {name: part for name, part in parts.items() if name not in skipped},
        {name: part for name, part in errors.items() if name not in skipped},
        details,
    )
    return sensitivity, layout, skipped


def _nearest(task: Task) -> tuple[Criterion, str | None]:
    """Return the criterion, or what comes nearest to one that cannot be had, and why it cannot."""
    if task.settings.criterion != "gauss-newton":
        return task.settings.criterion, None
    kind = task.objective().kind
    if kind == "other":
        batch = next(iter(task.batches()), None)
        if batch is None or batch.target is None:
            return "output-shift", "there are no labels for this loss, whose curvature is unknown"
        return "fisher", "the curvature of this loss in the outputs is unknown"
    outputs = traced_output(task.program)
    if outputs is None:
        return "output-shift", "the model has several outputs, but the loss uses only one"
    if kind == "cross-entropy" and (outputs.dim() < 2 or outputs.shape[1] == 1):
        return "output-shift", "the output has a single class, for which cross-entropy is constant"
    return "gauss-newton", None


def _measure(task: Task) -> Measured:
    match task.settings.criterion:
        case "hessian-trace" | "gauss-newton-trace":
            return trace_scores(task)
        case "taylor" | "fisher" | "gauss-newton" | "output-shift":
            return _gated(task)
        case "magnitude-l1":
            return Measured(magnitude(task.program, task.layout, 1))
        case "magnitude-l2":
            return Measured(magnitude(task.program, task.layout, 2))
        case "bn-scale":
            scores, known = norm_scale(task.program, task.layout)
            return Measured(scores, skipped=without(task.layout, known))
        case "activation":
            return Measured(activation(task.program, task.layout, task.batches()))
        case "random":
            generator = torch.Generator().manual_seed(task.context.seed)
            return Measured(torch.rand(len(task.layout), generator=generator, dtype=torch.float64))


def _gated(task: Task) -> Measured:
    settings, objective = task.settings, task.objective()
    assert settings.criterion in ("taylor", "fisher", "gauss-newton", "output-shift")
    gates = GateProbes(
        GatedProgram.of(task.program, task.layout.groups),
        objective,
        settings.criterion,
        settings.precision,
        settings.output_probes,
    )
    tally = Tally(len(task.layout))
    generator = torch.Generator().manual_seed(task.context.seed)
    for batch in task.context.progress.track(task.batches(), settings.criterion):
        for sample in gates.scores(batch, generator):
            tally.add(sample)
    if not tally.count:
        raise FxpruneError(
            f"none of {tally.dropped} samples had finite derivatives in {settings.precision}; "
            "use precision=bf16 or fp32"
        )
    details: Details = {"samples": tally.count, "dropped_samples": tally.dropped}
    return Measured(tally.mean, tally.error, details)
