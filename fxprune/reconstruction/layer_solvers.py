"""The two ways to mend a layer: solve for its weights, or descend with a look ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxprune.graph.facts import Removed
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.reconstruction.incremental_run import Values
from fxprune.reconstruction.lookahead import Curvature, Lookahead, Solver, variables
from fxprune.reconstruction.newton import Product, conjugate_gradients, dot, line_search
from fxprune.reconstruction.precondition import preconditioner
from fxprune.reconstruction.refit import Fit, Refit
from fxprune.reconstruction.region import Region

STAGNANT = 0.01  # a relative decrease under which another Newton step does not pay


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


@dataclass(frozen=True)
class Found:
    """The errors on samples held out before and after, and the steps of conjugate gradients."""

    before: float
    after: float
    cg_steps: int = 0


@dataclass(frozen=True, eq=False)
class Site:
    """A layer to mend.

    Attributes:
        program: what it is part of.
        region: the layer, and where its values are compared with the dense ones.
        keep: masks by tensor; nothing for those that may change everywhere.
        batch: returns, by number, the values before the region and the dense ones at its outputs.
        fitted: the numbers of the batches that make changes.
        judged: the numbers of those that judge them.
        samples: how many all batches hold.
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
    """Return what is left of a dense value after removal."""
    for dim, indices in (removed.kept.get(node.name, {}) if removed else {}).items():
        value = value.index_select(dim, indices.to(value.device))
    return value


def refit(site: Site, ridge: float) -> Found | None:
    """Solve for a layer's weights; None where there is nothing to mend."""
    layer = site.region.layer
    task = Refit(site.program, site.region, site.keep.get(layer.weight), site.samples)
    for number in dict.fromkeys([*site.fitted, *site.judged]):
        task.add(*site.batch(number), held_out=number not in site.fitted)
    if len(layer.calls) == 1:
        return _found(task.apply(ridge))

    def error() -> float:  # calls may feed each other, so look what came of it
        return sum(task.error(*site.batch(number)) for number in site.judged)

    stored, before = task.stored(), error()
    fit = task.apply(ridge)
    if fit is None or error() < before:
        return _found(fit)
    for name, value in stored.items():
        set_tensor(site.program, name, value)
    return Found(fit.before, fit.before)


def _found(fit: Fit | None) -> Found | None:
    return None if fit is None else Found(fit.before, fit.after)


def descend(site: Site, settings: SolverSettings) -> Found | None:
    """Take Newton steps on a layer's weights; None where there is nothing to mend.

    The curvature is that of one batch, another one for each step. The gradient is that of all
    fitted batches, and the others judge; the paper has both of that one batch as well.
    """
    task, precondition = _task(site, settings)
    paper, fitted = settings.solver == "paper", site.fitted or site.judged
    point = task.point()
    loss = before = task.loss(site.judged, point)
    if not before:
        return None
    steps = 0
    for number in range(settings.steps):
        one = fitted[number % len(fitted)]
        seen, judged = ([one], [one]) if paper else (fitted, site.judged)
        loss = task.loss(judged, point) if paper else loss
        gradient = task.gradient(seen, point)
        direction = conjugate_gradients(
            task.product(one, point, settings.curvature), gradient, damping=settings.damping,
            tolerance=settings.tolerance, most=settings.cg_steps, precondition=precondition,
        )  # fmt: skip
        steps += direction.steps
        slope = dot(gradient, direction.vector)
        judge = functools.partial(task.loss, judged)
        found = line_search(judge, point, loss, direction.vector, slope)
        if found is None:
            break
        point, last, loss = found[0], loss, found[1]
        if last - loss < STAGNANT * last:
            break
    loss = task.loss(site.judged, point) if paper else loss
    if paper or loss < before:
        for name, value in zip(task.names, point, strict=True):
            set_tensor(site.program, name, value)
    return Found(before, loss, steps)


def _task(site: Site, settings: SolverSettings) -> tuple[Lookahead, Product | None]:
    """What to minimise, and what makes the conjugate gradients need fewer steps."""
    layer = site.region.layer
    if settings.solver == "paper":
        task = Lookahead(
            site.program, site.region, (layer.weight,), (site.keep.get(layer.weight),),
            site.batch, site.dense, weighed=False,
        )  # fmt: skip
        return task, None
    names = variables(site.program, site.region)
    keeps = tuple(site.keep.get(name) for name in names)
    task = Lookahead(site.program, site.region, names, keeps, site.batch, {})
    first = site.batch((site.fitted or site.judged)[0])[0]
    return task, preconditioner(site.program, layer, names, keeps[0], first)
