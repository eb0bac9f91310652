"""Plans within a latency budget: solved on the table, tried out, and corrected where that misses.

A table of layers is right to some per cent. So the network that a plan leaves is exported and timed
against the dense one; if it misses the budget, the plan is solved anew with all predictions scaled
by how far this one was off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxprune.graph.program import Program
from fxprune.latency.bench import Bench, open_bench
from fxprune.latency.table import Table
from fxprune.pipeline.context import Context
from fxprune.planning.budget import Target
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.problem import Problem
from fxprune.planning.solver import Solution, solve
from fxprune.structure.merging import Ints

AIM = 0.03  # a plan whose measured latency is this close to its budget is not made anew
TOLERANCE = 0.02  # of plans; latencies are not known better

Cut = Callable[[Ints], Program]  # a copy of the program, without so many units of each group


@contextmanager
def bench_for(
    targets: Sequence[Target], program: Program, context: Context
) -> Iterator[Bench | None]:
    """Open a bench for as long as it is needed, if one of the targets is a latency."""
    if not any(target.name == "latency" for target in targets):
        yield None
        return
    dense = (context.dense or program).copy().to("cpu").eval()
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        table = Table.open(context.threads)
        yield open_bench(dense, Path(folder), table, context.progress)


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan, and the latency of what it leaves.

    Attributes:
        solution: the plan.
        predicted_ms: by the table, each layer at its own widths.
        measured_ms: in ONNX Runtime, beside the dense model; None if it was not tried.

    """

    solution: Solution
    predicted_ms: float
    measured_ms: float | None

    def over(self, limit: float) -> float:
        """Return by what share it exceeds a limit as far as is known; negative if it does not."""
        return (self.measured_ms or self.predicted_ms) / limit - 1


def solve_and_try(
    problem: Problem, bench: Bench | None, cut: Cut, corrections: int
) -> tuple[Solution, dict[str, Any] | None]:
    """Solve a problem; if its last quantity is latency, try the solution, and correct it.

    Args:
        problem: its costs predict latency by the bench's table.
        bench: what measures; None if the problem is not about latency.
        cut: carries a plan out.
        corrections: how often a plan that misses is solved anew; zero tries none out.

    Returns:
        Of the plans tried, the one within the budget that spends the least sensitivity, else the
        fastest, and what the report tells of its latency.

    Raises:
        BudgetError: no cut meets the budget.

    """
    if bench is None:
        return solve(problem), None
    problem = replace(problem, tolerance=max(problem.tolerance, TOLERANCE))
    limit, limits = float(problem.limits[-1]), problem.limits
    trials: list[Trial] = []
    for _ in range(corrections + 1):
        trials.append(_try(replace(problem, limits=limits), bench, cut, corrections > 0))
        if not _misses(trials[-1], problem, limits):
            break
        limits = _corrected(trials[-1], limits, limit)
    best = min(trials, key=lambda one: (max(one.over(limit) - AIM, 0.0), one.solution.loss))
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
    """Tell whether a trial exceeds the budget, or falls short of it because of the prediction."""
    if trial.measured_ms is None:
        return False
    over = trial.over(float(problem.limits[-1]))
    binding = trial.solution.values[-1] >= (1 - 2 * problem.tolerance) * limits[-1]
    return over > AIM or (over < -AIM and bool(binding))


def _corrected(trial: Trial, limits: Floats, limit: float) -> Floats:
    assert trial.measured_ms is not None
    limits = limits.copy()
    limits[-1] = trial.solution.values[-1] * limit / trial.measured_ms
    return limits


def _told(best: Trial, limit: float, bench: Bench) -> Solution:
    """Add to a solution's notes what there is to tell of its latency."""
    notes = [*best.solution.notes, *bench.table.notes]
    if best.measured_ms is not None and best.over(limit) > AIM:
        notes.append(
            f"the plan's latency was measured as {best.measured_ms:.3g} ms, "
            f"{best.over(limit):.1%} over its budget; no plan that was tried came closer"
        )
    values = best.solution.values.copy()
    values[-1] = best.predicted_ms
    return replace(best.solution, notes=tuple(notes), values=values)
