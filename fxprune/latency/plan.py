"""Plan for a latency budget: solve with the table, measure the result, and correct the plan.

Predictions from a table of layers are wrong by some per cent. So the planned network is exported
and timed against the dense one; if it misses the budget, the plan is solved again with all
predictions scaled by the error of this one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxprune.graph.program import Program
from fxprune.latency.bench import Bench, open_bench
from fxprune.latency.table import Table
from fxprune.pipeline.context import Context
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.problem import Problem
from fxprune.planning.solver import Solution, solve
from fxprune.structure.merging import Ints

MEASURED_TOLERANCE = 0.03  # plans with a measured latency this close to the budget are final
TOLERANCE = 0.02  # of plans: predicted latencies are not more accurate than this

Cut = Callable[
    [Ints], Program
]  # returns a copy of the program with so many units of each group removed


@contextmanager
def latency_bench(program: Program, context: Context) -> Iterator[Bench]:
    """Measure the dense program, and yield what predicts and measures smaller ones beside it."""
    dense = (context.dense or program).copy().to("cpu").eval()
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        yield open_bench(dense, Path(folder), Table.of(context), context)


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan, and the latency of the planned network.

    Attributes:
        solution: the plan.
        predicted_ms: latency by the table, with each layer at its exact widths.
        measured_ms: latency in ONNX Runtime, measured beside the dense model; None if not
            measured.

    """

    solution: Solution
    predicted_ms: float
    measured_ms: float | None

    def over(self, limit: float) -> float:
        """Return the excess over a limit as a fraction, measured if possible; negative if below."""
        return (self.measured_ms or self.predicted_ms) / limit - 1


def solve_and_try(
    problem: Problem, bench: Bench, cut: Cut, corrections: int
) -> tuple[Solution, dict[str, Any]]:
    """Solve a problem whose last quantity is latency, measure the solution and correct it.

    Args:
        problem: the planning problem; its costs predict latency by the table of the bench.
        bench: the latency bench.
        cut: function that carries out a plan on a copy.
        corrections: how many times to re-plan after a miss; 0 disables measuring.

    Returns:
        The plan with the least sensitivity among those within the budget, else the fastest plan,
        and the figures of its latency for the report.

    Raises:
        BudgetError: no cut meets the budget.

    """
    problem = replace(problem, tolerance=max(problem.tolerance, TOLERANCE))
    limit, limits = float(problem.limits[-1]), problem.limits
    trials: list[Trial] = []
    measured = corrections > 0 and bench.table.network is None  # another machine is not at hand
    for _ in range(corrections + 1):
        trials.append(_try(replace(problem, limits=limits), bench, cut, measured))
        if not _misses(trials[-1], problem, limits):
            break
        limits = _corrected(trials[-1], limits, limit)
    best = min(
        trials, key=lambda one: (max(one.over(limit) - MEASURED_TOLERANCE, 0.0), one.solution.loss)
    )
    return _told(best, limit, bench), {
        "dense_ms": bench.dense_ms,
        "predicted_ms": best.predicted_ms,
        "measured_ms": best.measured_ms,
        "plans": len(trials),
        "table": bench.table.about(bench.table.used),
    }


def _try(problem: Problem, bench: Bench, cut: Cut, measured: bool) -> Trial:
    found = solve(problem)
    small = cut(found.removed)
    return Trial(found, bench.predict(small), bench.measure(small) if measured else None)


def _misses(trial: Trial, problem: Problem, limits: Floats) -> bool:
    """Whether a trial exceeds the budget, or stays below it because of a wrong prediction."""
    if trial.measured_ms is None:
        return False
    over = trial.over(float(problem.limits[-1]))
    binding = trial.solution.values[-1] >= (1 - 2 * problem.tolerance) * limits[-1]
    return over > MEASURED_TOLERANCE or (over < -MEASURED_TOLERANCE and bool(binding))


def _corrected(trial: Trial, limits: Floats, limit: float) -> Floats:
    assert trial.measured_ms is not None
    limits = limits.copy()
    limits[-1] = trial.solution.values[-1] * limit / trial.measured_ms
    return limits


def _told(best: Trial, limit: float, bench: Bench) -> Solution:
    """Add notes about latency to a solution."""
    notes = [*best.solution.notes, *bench.table.notes]
    if best.measured_ms is not None and best.over(limit) > MEASURED_TOLERANCE:
        notes.append(
            f"the measured latency of the plan is {best.measured_ms:.3g} ms, "
            f"{best.over(limit):.1%} over its budget; no other plan came closer"
        )
    values = best.solution.values.copy()
    values[-1] = best.predicted_ms
    return replace(best.solution, notes=tuple(notes), values=values)
