from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support import trace
from torch import nn

from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN
from fxprune.graph.program import Program
from fxprune.passes import AnnotateSensitivity, PlanChannels, RemoveChannels
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome, Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Target
from fxprune.planning.search import Limits, Trial, budgeted, search, winner

MODEL = nn.Sequential(
    nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3),
    nn.Flatten(),
)  # fmt: skip


@dataclass(frozen=True)
class Count(Pass):
    """Counts its runs, outside of itself."""

    name: ClassVar[str] = "count"
    runs: ClassVar[list[int]] = []

    def run(self, program: Program, context: Context) -> Outcome:
        self.runs.append(1)
        return Outcome()


def pipeline() -> Pipeline:
    return Pipeline(
        [Count(), AnnotateSensitivity(criterion="magnitude-l2"), PlanChannels(), RemoveChannels()]
    )


def run(limits: Limits, knee: float) -> tuple[tuple[Trial, ...], Program]:
    """Search with an accuracy that falls off below a share of the multiply-accumulates."""
    program = trace(MODEL, torch.randn(1, 3, 10, 10))
    whole = cost(program).macs

    def judge(tried: Program) -> float:
        share = cost(tried).macs / whole
        return 0.9 if share >= knee else 0.9 - (knee - share)

    return search(program, pipeline(), Context(), judge, limits), program


@pytest.mark.parametrize("knee", [0.75, 0.5, 0.22, 0.09])
def test_finds_the_smallest_that_fits(knee: float) -> None:
    trials, program = run(Limits(max_drop=1.0, trials=9), knee)
    best = winner(trials, Limits(1.0))
    assert best.fits
    assert best.macs is not None
    assert best.drop is not None
    smallest = knee - 0.01  # a hundredth below the knee is a point lost
    assert smallest <= best.macs / cost(program).macs <= 1.1 * smallest
    assert best.drop <= 1.0
    assert all(trial.fits == (trial.share >= best.share) for trial in trials)


def test_what_comes_before_the_plan_runs_once() -> None:
    Count.runs.clear()
    trials, program = run(Limits(max_drop=1.0, trials=4), 0.5)
    assert len(Count.runs) == 1
    assert len(trials) == 4
    assert not program.facts


def test_the_winner_can_be_run_again() -> None:
    trials, program = run(Limits(max_drop=1.0), 0.4)
    best = winner(trials, Limits(1.0))
    again = program.copy()
    target = Target.parse(best.target)
    Pipeline([budgeted(step, target) for step in pipeline()]).run(again)
    assert cost(again).macs == best.macs


def test_stops_when_budgets_cannot_be_told_apart() -> None:
    trials, _ = run(Limits(max_drop=1.0, trials=50, resolution=1.2), 0.5)
    assert len(trials) < 10


def test_a_budget_that_cannot_be_met_counts_as_too_small() -> None:
    trials, _ = run(Limits(max_drop=100.0, trials=9), 0.1)
    failed = [trial for trial in trials if trial.accuracy is None]
    assert failed
    assert all(not trial.fits and trial.reason for trial in failed)
    assert winner(trials, Limits(100.0)).share > max(trial.share for trial in failed)


def test_says_that_nothing_fits() -> None:
    trials, _ = run(Limits(max_drop=0.0, trials=3), 2.0)
    with pytest.raises(BudgetError, match=r"within 0 points: macs=.* already loses"):
        winner(trials, Limits(0.0))


def test_needs_a_plan_and_an_accuracy() -> None:
    program = trace(MODEL, torch.randn(1, 3, 10, 10))
    with pytest.raises(InputError, match="a pass that plans"):
        search(program, Pipeline([]), Context(), lambda _: 1.0, Limits(1.0))
    with pytest.raises(InputError, match="evaluation data"):
        search(program, pipeline(), Context(), lambda _: None, Limits(1.0))
    with pytest.raises(InputError, match="at least 0 points"):
        Limits(-1.0)


def test_other_passes_keep_their_options() -> None:
    target = Target.parse("macs=25%")
    assert budgeted(RemoveChannels(), target) == RemoveChannels()
    assert budgeted(PlanChannels(round_to=4), target) == PlanChannels(macs="25%", round_to=4)
    assert PLAN in PlanChannels.gives
