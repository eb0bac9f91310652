"""The two solvers of a layer: least squares for its output, and Newton steps with lookahead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from fxprune.graph.facts import Removed
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.reconstruction.incremental_run import Values
from fxprune.reconstruction.lookahead import Curvature, Lookahead, Solver, variables
from fxprune.reconstruction.newton import Product, conjugate_gradients, dot, line_search
from fxprune.reconstruction.precondition import preconditioner
from fxprune.reconstruction.refit import LayerResult, Refit
from fxprune.reconstruction.region import Region

MIN_RELATIVE_DECREASE = 0.01  # of the loss; after less, no further Newton step is taken


@dataclass(frozen=True)
class SolverSettings:
    """How to solve for a layer's weights.

    Attributes:
        ridge: strength of the pull towards the current weights, relative to the mean square of
            their inputs.
        held_out: fraction of the samples that judges changes and is not fitted.
        curvature: second derivatives of the residuals only, or of the whole loss as in the paper.
        steps: largest number of Newton steps per layer.
        cg_steps: largest number of conjugate-gradient steps per Newton step.
        damping: term added to the curvature, relative to the curvature along the gradient.
        tolerance: residual at which conjugate gradients stop, relative to the gradient.
        solver: ``own``, or ``paper`` for the method as arXiv 2411.18376 publishes it.

    """

    ridge: float = 1e-3
    held_out: float = 0.2
    curvature: Curvature = "gauss-newton"
    steps: int = 2
    cg_steps: int = 10
    damping: float = 1e-3
    tolerance: float = 1e-3
    solver: Solver = "own"


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A layer to reconstruct, with its data.

    Attributes:
        program: the program that it is part of.
        region: the layer, and the operations up to those compared with the dense program.
        keep: masks by tensor name; a tensor without a mask may change everywhere.
        batch: returns, by number, the values before the region and the dense values at its outputs.
        fitted: the numbers of the batches that weights are fitted to.
        judged: the numbers of the held-out batches that judge changes.
        samples: the number of samples in all batches.
        dense: the dense program's tensors that the region reads, by name.

    """

    program: Program
    region: Region
    keep: Mapping[str, Tensor]
    batch: Callable[[int], tuple[Values, list[Tensor]]]
    fitted: range
    judged: range
    samples: int = 1
    dense: Mapping[str, Tensor] = field(default_factory=dict)


def restrict(value: Tensor, node: fx.Node, removed: Removed | None) -> Tensor:
    """Return the part of a dense value that remains after removal."""
    for dim, indices in (removed.kept.get(node.name, {}) if removed else {}).items():
        value = value.index_select(dim, indices.to(value.device))
    return value


def refit(problem: LayerProblem, ridge: float) -> LayerResult | None:
    """Solve for a layer's weights; return None where there is no error to reduce."""
    layer = problem.region.layer
    task = Refit(problem.program, problem.region, problem.keep.get(layer.weight), problem.samples)
    for number in dict.fromkeys([*problem.fitted, *problem.judged]):
        task.add(*problem.batch(number), held_out=number not in problem.fitted)
    if len(layer.calls) == 1:
        return task.apply(ridge)

    def error() -> float:  # calls may feed each other, so their outputs are computed again
        return sum(task.error(*problem.batch(number)) for number in problem.judged)

    stored, before = task.stored(), error()
    fit = task.apply(ridge)
    if fit is None or error() < before:
        return fit
    for name, value in stored.items():
        set_tensor(problem.program, name, value)
    return replace(fit, after=fit.before)


def descend(problem: LayerProblem, settings: SolverSettings) -> LayerResult | None:
    """Take Newton steps on a layer's weights; return None where there is no error to reduce.

    Every step takes the curvature from another batch and the gradient from all fitted batches;
    the held-out batches judge it. The published method (``paper``) takes gradient, curvature and
    loss from the one batch.
    """
    task, precondition = _task(problem, settings)
    paper, fitted = settings.solver == "paper", problem.fitted or problem.judged
    point = task.point()
    loss = before = task.loss(problem.judged, point)
    if not before:
        return None
    steps = 0
    for number in range(settings.steps):
        one = fitted[number % len(fitted)]
        seen, judged = ([one], [one]) if paper else (fitted, problem.judged)
        loss = task.loss(judged, point) if paper else loss
        gradient = task.gradient(seen, point)
        direction = conjugate_gradients(
            task.product(one, point, settings.curvature), gradient, damping=settings.damping,
            tolerance=settings.tolerance, max_steps=settings.cg_steps, precondition=precondition,
        )  # fmt: skip
        steps += direction.steps
        slope = dot(gradient, direction.vector)
        judge = functools.partial(task.loss, judged)
        found = line_search(judge, point, loss, direction.vector, slope)
        if found is None:
            break
        point, last, loss = found[0], loss, found[1]
        if last - loss < MIN_RELATIVE_DECREASE * last:
            break
    loss = task.loss(problem.judged, point) if paper else loss
    if paper or loss < before:
        for name, value in zip(task.names, point, strict=True):
            set_tensor(problem.program, name, value)
    region = problem.region
    return LayerResult(region.layer.weight, region.outputs[-1].name, before, loss, cg_steps=steps)


def _task(problem: LayerProblem, settings: SolverSettings) -> tuple[Lookahead, Product | None]:
    """Return the loss to minimise and the preconditioner of conjugate gradients."""
    layer = problem.region.layer
    if settings.solver == "paper":
        task = Lookahead(
            problem.program, problem.region, (layer.weight,), (problem.keep.get(layer.weight),),
            problem.batch, problem.dense, weighted=False,
        )  # fmt: skip
        return task, None
    names = variables(problem.program, problem.region)
    keeps = tuple(problem.keep.get(name) for name in names)
    task = Lookahead(problem.program, problem.region, names, keeps, problem.batch, {})
    first = problem.batch((problem.fitted or problem.judged)[0])[0]
    return task, preconditioner(problem.program, layer, names, keeps[0], first)
