"""A path of ever cheaper programs: each step removes what moves the outputs least per cost saved.

The price of a move is the damage that it adds divided by the cost that it saves, both of the whole
program. A price that was found earlier on the path stands in for today's, since removal tends to
become dearer as less remains; the moves that look cheapest are priced again, and the first that
remains cheapest is made (lazy greedy, Minoux 1978).
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fxprune.errors import FxpruneError
from fxprune.graph.program import Program
from fxprune.search.moves import Move, Ranking, moved, moves, plan_of
from fxprune.search.plan import NetworkPlan

MIN_SAVING = 2e-3  # of the dense cost; what a step saves less is noise
MAX_DAMAGE = 1.0  # outputs then have nothing in common with the dense program's


@dataclass(frozen=True)
class Point:
    """A program on the path.

    Attributes:
        plan: how to make it from the dense program.
        cost: what it is predicted to cost.
        damage: how far its outputs are from the dense program's, before accuracy is restored.
        move: the last step to it; None for the dense program.

    """

    plan: NetworkPlan
    cost: float
    damage: float
    move: Move | None = None


@dataclass(frozen=True, eq=False)
class _State:
    program: Program
    cost: float
    damage: float
    done: tuple[Move, ...] = ()


class Descent:
    """Walks the path.

    Args:
        ranking: of the units of the dense program.
        damage: judges a program.
        cost: predicts what a program costs.
        deadline: when the path ends at the latest, as ``time.monotonic`` counts.

    """

    def __init__(
        self,
        ranking: Ranking,
        damage: Callable[[Program], float],
        cost: Callable[[Program], float],
        deadline: float = math.inf,
    ) -> None:
        self._ranking, self._damage, self._cost = ranking, damage, cost
        self._deadline = deadline
        self._prices: dict[Move, float] = {}
        self.trials = 0
        self.stopped_by_time = False

    def walk(self, dense: Program, least_cost: float) -> Iterator[Point]:
        """Yield points of falling cost, the dense program first, until none should follow."""
        state = _State(dense, self._cost(dense), 0.0)
        whole = state.cost
        yield Point(NetworkPlan(attention=self._ranking.attention), whole, 0.0)
        while state.cost > least_cost and state.damage < MAX_DAMAGE:
            best = self._cheapest(state, MIN_SAVING * whole)
            if best is None:
                return
            move, state = best
            plan = plan_of(state.done, self._ranking)
            yield Point(plan, state.cost, state.damage, move)

    def _cheapest(self, state: _State, min_saving: float) -> tuple[Move, _State] | None:
        """Return the move of the lowest price and where it leads; None if there is none."""
        queue = [
            (self._prices.get(move, -math.inf), number, move)
            for number, move in enumerate(moves(state.program, self._ranking))
        ]
        heapq.heapify(queue)
        priced: dict[Move, _State] = {}
        while queue and queue[0][2] not in priced:
            if time.monotonic() > self._deadline:
                self.stopped_by_time = True
                return None
            _, number, move = queue[0]
            self._prices[move], priced[move] = self._price(state, move, min_saving)
            heapq.heapreplace(queue, (self._prices[move], number, move))
        if not queue or queue[0][0] == math.inf:
            return None
        return queue[0][2], priced[queue[0][2]]

    def _price(self, state: _State, move: Move, min_saving: float) -> tuple[float, _State]:
        """Return damage per cost saved, and the state after the move; infinite if it is no use."""
        self.trials += 1
        try:
            program = moved(state.program, move, self._ranking)
        except FxpruneError:  # the verification of the surgery refuses it
            return math.inf, state
        cost = self._cost(program)
        if state.cost - cost < min_saving:
            return math.inf, state
        damage = self._damage(program)
        found = _State(program, cost, damage, (*state.done, move))
        return (damage - state.damage) / (state.cost - cost), found
