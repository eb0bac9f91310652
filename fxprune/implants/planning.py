"""Planning three tiers: what plan-channels does where implants are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from fxprune.errors import BudgetError, InputError
from fxprune.graph.facts import Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.implants.candidates import prospects
from fxprune.implants.evaluation import Trials
from fxprune.implants.implant_types import Kind
from fxprune.implants.low_rank_layers import Ranks, ranks_of, spectrum, with_layers
from fxprune.implants.mixed_plan import tiers
from fxprune.implants.moments import Sampling, measure
from fxprune.implants.sites import sites_of
from fxprune.pipeline.context import Context
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.cost_model import CostModel, cost_model
from fxprune.planning.problem import Problem
from fxprune.planning.ranking import Normalize, cheapest_first, scores_in_order
from fxprune.planning.solver import Solution, solve
from fxprune.planning.widths import Rounding
from fxprune.structure.groups import Group

# What a unit of an implant's predicted loss weighs against one of removal's. Scores of single units
# tell too little of the loss when many go, so that implants look dearer than they are; but what is
# mended after removal is more than what can be mended after implants.
RATES = (10.0, 3.0, 1.0, 0.3)
SAMPLING = Sampling(samples=256, batch_size=64, positions=32768)
TRIED, TRIED_AT_ONCE = 256, 32  # samples that judge plans, and how many of them make a batch


def implant_share(value: float | str) -> float | None:
    """Read the option: a share of each cut, or ``auto`` (None) for the best.

    Raises:
        InputError: it is neither.

    """
    if value == "auto":
        return None
    if isinstance(value, str) or not 0 <= value <= 1:
        raise InputError(f"implant-ratio is {value}; it must be auto or a number between 0 and 1")
    return value


class Options(Protocol):
    """Options of the pass that plans."""

    @property
    def implant_ratio(self) -> float | str:
        """The share of each cut that gets implants, or ``auto``."""

    @property
    def normalize(self) -> Normalize:
        """How scores are scaled."""


def plan_tiers(
    program: Program, context: Context, groups: Sequence[Group], problem: Problem,
    sensitivity: Sensitivity, options: Options, rounding: Rounding,
) -> tuple[Plan, Solution]:  # fmt: skip
    """Solve a problem of removal with implants as a third way, and say what gets which.

    Args:
        program: what is planned for.
        context: for its calibration samples, and the passes that restore accuracy, which run on
            every plan before it is judged.
        groups: in the order of the problem.
        problem: of removal alone.
        sensitivity: of the groups' units.
        options: with a share of each cut that gets implants, or ``auto`` for ranks of layers.
        rounding: what widths and ranks are multiples of.

    Raises:
        InputError: a quantity of the problem has no closed form, such as latency.
        BudgetError: the budget cannot be met.

    """
    if "latency_ms" in problem.costs.quantities:
        raise InputError(
            "implants cannot be planned for a latency budget; give a budget of macs, params or size"
        )
    model, ratio = cost_model(program, groups), implant_share(options.implant_ratio)
    scores = [scores_in_order(sensitivity, group, options.normalize) for group in groups]
    orders = [cheapest_first(sensitivity, group) for group in groups]
    if ratio is None:
        pairs = zip(groups, scores, orders, strict=True)
        by_unit = {group: own[np.argsort(order)] for group, own, order in pairs}
        ladder = rounding.ladder()
        return _with_layers(program, context, problem, model, by_unit, ladder)
    found = prospects(program, groups, context, SAMPLING)
    mixed = tiers(program, problem, model, scores, orders, found, ratio)
    solution = solve(mixed.problem)
    return mixed.plan(solution), solution


def _with_layers(
    program: Program, context: Context, problem: Problem, model: CostModel,
    scores: Mapping[Group, Floats], roundings: Sequence[Rounding],
) -> tuple[Plan, Solution]:  # fmt: skip
    """Mix removal and layers of low rank, by the exchange rate that moves the output least."""
    sites, _ = sites_of(program, {group: range(len(group.units)) for group in scores})
    moments = measure(program, sites, context, SAMPLING)
    spectra = {site.node.name: spectrum(program, site, moments[site.node.name]) for site in sites}
    layers = ranks_of(sites, spectra, scores, roundings)
    trials = Trials(program, list(scores), moments, context, TRIED, TRIED_AT_ONCE)
    found: list[tuple[float, Plan, Solution]] = []
    errors = []
    for rate in context.progress.track((None, *RATES), "weighing implants", total=1 + len(RATES)):
        try:
            solution = solve(_widened(program, problem, model, layers, rate))
        except BudgetError as error:
            errors.append(error)
            continue
        plan = _plan(solution, scores, layers if rate else [])
        if plan not in [tried for _, tried, _ in found]:
            found.append((trials.moved(plan), plan, solution))
    if not found:
        raise errors[-1]
    _, plan, solution = min(found, key=lambda item: item[0])
    return plan, solution


def _widened(
    program: Program, problem: Problem, model: CostModel, layers: Sequence[Ranks],
    rate: float | None,
) -> Problem:  # fmt: skip
    """The problem with implants at an exchange rate; None is for removal alone."""
    if rate is None:
        return problem
    cheaper = [replace(layer, losses=layer.losses * rate) for layer in layers]
    return with_layers(program, problem, model, cheaper)


def _plan(solution: Solution, scores: Mapping[Group, Floats], layers: Sequence[Ranks]) -> Plan:
    numbers = solution.removed.tolist()
    pairs = zip(scores.items(), numbers[: len(scores)], strict=True)
    remove = {
        group.name: tuple(sorted(np.argsort(own, kind="stable")[:number].tolist()))
        for (group, own), number in pairs
        if number
    }
    kinds = {
        layer.site.weight: str(Kind("low-rank", int(layer.ranks[number])))
        for layer, number in zip(layers, numbers[len(scores) :], strict=True)
        if number
    }
    return Plan(remove, notes=solution.notes, kinds=kinds)
