"""The search for the smallest model that loses no more accuracy than allowed.

Accuracy falls as the budget shrinks, nearly enough for bisection: between the smallest budget that
was good enough and the largest that was not, the geometric mean is tried next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN
from fxprune.graph.notebook import plural
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Name, Target

Judge = Callable[[Program], float | None]  # accuracy from 0 to 1; None if it cannot be measured


@dataclass(frozen=True)
class Trial:
    """One budget that was tried.

    Attributes:
        target: the budget.
        share: what it leaves, as a fraction of the dense model's cost.
        params: of the result; None where the budget could not be met.
        macs: likewise.
        accuracy: likewise, on the evaluation data.
        drop: points of accuracy lost.
        fits: whether that is within what was allowed.
        seconds: what the trial took.
        reason: why the budget could not be met.

    """

    target: str
    share: float
    params: int | None
    macs: int | None
    accuracy: float | None
    drop: float | None
    fits: bool
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class Limits:
    """What a search may do.

    Attributes:
        max_drop: points of accuracy that may be lost.
        name: the quantity that is made small.
        trials: how many budgets are tried at most.
        first: the share of the dense cost that is tried first.
        resolution: two budgets closer than this, as a ratio, count as one.

    """

    max_drop: float
    name: Name = "macs"
    trials: int = 8
    first: float = 0.5
    resolution: float = 1.05

    def __post_init__(self) -> None:
        if not self.max_drop >= 0 or self.trials < 1:
            raise InputError(
                "a search needs a max-drop of at least 0 points and at least one trial"
            )


def search(
    program: Program,
    pipeline: Pipeline,
    context: Context,
    judge: Judge,
    limits: Limits,
) -> tuple[Trial, ...]:
    """Try budgets until the smallest that keeps the accuracy is known well enough.

    Every trial runs the pipeline on a copy of the program, with the trial's budget in the passes
    that plan; what comes before the first of them is run once. All trials judge on the same data,
    so the winner's accuracy is a little optimistic.

    Args:
        program: the dense program; it is left as it is.
        pipeline: passes of which at least one gives a plan and takes a budget.
        context: for the passes.
        judge: gives the accuracy of a program.
        limits: what to search for, and how long.

    Returns:
        The trials in the order in which they were made; see ``winner``.

    Raises:
        InputError: the pipeline plans nothing, or accuracy cannot be measured.

    """
    planners = [number for number, step in enumerate(pipeline.passes) if PLAN in step.gives]
    if not planners:
        raise InputError(
            "a search with max-drop needs a pass that plans for a budget, such as plan-channels"
        )
    dense = judge(program)
    if dense is None:
        raise InputError("a search with max-drop needs evaluation data with class labels")
    context = replace(context, dense=context.dense or program.copy())
    prepared = program.copy()
    Pipeline(pipeline.passes[: planners[0]]).run(prepared, context)
    rest = pipeline.passes[planners[0] :]
    found: list[Trial] = []
    good, bad, share = 1.0, 0.0, limits.first
    for _ in context.progress.track(range(limits.trials), "searching", total=limits.trials):
        found.append(_try(prepared, rest, context, judge, limits, share, dense))
        good, bad = (share, bad) if found[-1].fits else (good, share)
        share = math.sqrt(good * bad) if bad else good / 2
        if bad and good / bad < limits.resolution:
            break
    return tuple(found)


def winner(trials: tuple[Trial, ...], limits: Limits) -> Trial:
    """Return the smallest trial that fits.

    Raises:
        BudgetError: no trial fits; the message states the best one.

    """
    fitting = [trial for trial in trials if trial.fits]
    if fitting:
        return min(fitting, key=lambda trial: trial.share)
    with_accuracy = [trial for trial in trials if trial.drop is not None]
    nearest = min(with_accuracy, key=lambda trial: trial.drop or 0.0, default=None)
    text = f"no budget keeps the accuracy within {limits.max_drop:g} points: "
    if nearest is None:
        raise BudgetError(
            f"{text}none of the {plural(len(trials), 'budget')} could be met; {trials[-1].reason}"
        )
    raise BudgetError(
        f"{text}{nearest.target} already loses {nearest.drop:.2f}; fine-tune with --epochs N, or "
        "allow a larger --max-drop"
    )


def _try(
    prepared: Program, rest: tuple[Pass, ...], context: Context, judge: Judge,
    limits: Limits, share: float, dense: float,
) -> Trial:  # fmt: skip
    target = Target(limits.name, round(share, 4), relative=True)
    start = time.perf_counter()
    trial = prepared.copy()
    try:
        for step in rest:
            budgeted(step, target)(trial, context)
    except BudgetError as error:
        seconds = time.perf_counter() - start
        return Trial(str(target), share, None, None, None, None, False, seconds, str(error))
    accuracy = judge(trial)
    assert accuracy is not None
    drop, after = 100 * (dense - accuracy), cost(trial)
    return Trial(
        str(target), share, after.params, after.macs, accuracy, drop,
        drop <= limits.max_drop + 1e-9, time.perf_counter() - start,
    )  # fmt: skip


def budgeted(step: Pass, target: Target) -> Pass:
    """Give a pass that plans the budget of a trial; others stay as they are."""
    if PLAN not in step.gives:
        return step
    return replace(step, **{target.name: str(target).partition("=")[2]})
