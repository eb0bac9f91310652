"""Which residual branches go: those that move the output least for the cost that goes with them.

One branch goes at a time. An old judgement stands for what a branch would move the output by now;
those that look cheapest are judged anew, and the first that stays cheapest goes. Judging all of
them each time takes longer and may find better ones: a branch may matter less without others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fxprune.errors import BudgetError
from fxprune.graph.cost import cost
from fxprune.graph.program import Program
from fxprune.planning.budget import readable
from fxprune.structure.branches import Branch, find_branches, remove_branch

Shift = Callable[[Program], float]  # how far a program's output is from the dense one's


@dataclass(frozen=True)
class Gone:
    """A branch that went.

    Attributes:
        title: its module, and what of that it was.
        add: the name of the addition that ended it.
        weights: the names of the weights that went with it.
        macs: multiply-accumulates that are left, per sample.
        shift: how far the output is then from what it was.

    """

    title: str
    add: str
    weights: tuple[str, ...]
    macs: int
    shift: float


def remove_blocks(
    program: Program, limit: float, shift: Shift, allowed: Callable[[Branch], bool]
) -> Iterator[Gone]:
    """Remove branches in place until no more multiply-accumulates are left than a limit.

    Args:
        program: what loses branches.
        limit: multiply-accumulates per sample.
        shift: judges a program.
        allowed: tells of a branch whether it may go.

    Yields:
        Every branch, once it is gone.

    Raises:
        BudgetError: all that are allowed are gone and more is left than the limit.

    """
    left, moved = cost(program).macs, 0.0
    bounds: dict[str, float] = {}
    while left > limit:
        branches = {one.add.name: one for one in find_branches(program) if allowed(one)}
        judged: dict[str, Gone] = {}
        queue = [(bounds.get(name, 0.0), name) for name in branches]
        heapq.heapify(queue)
        while queue and queue[0][1] not in judged:
            name = queue[0][1]
            found = judged[name] = _judge(program, branches[name], shift)
            saved = max(left - found.macs, 1)
            bounds[name] = (found.shift - moved) / saved
            heapq.heapreplace(queue, (bounds[name], name))
        if not queue:
            raise BudgetError(
                f"{readable('macs', left)} remain after all removable residual branches are "
                f"removed, but the budget allows {readable('macs', limit)}; raise the budget, or "
                "protect fewer branches"
            )
        chosen = judged[queue[0][1]]
        remove_branch(program, branches[chosen.add])
        left, moved = chosen.macs, chosen.shift
        yield chosen


def _judge(program: Program, branch: Branch, shift: Shift) -> Gone:
    trial = program.copy(share=True)
    add = branch.add.name
    remove_branch(trial, next(one for one in find_branches(trial) if one.add.name == add))
    return Gone(branch.title, add, branch.weights, cost(trial).macs, shift(trial))
