"""Passes and pipelines: the contract of a pass and the driver that runs several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fxprune.errors import OrderError
from fxprune.graph.cost import Cost, cost
from fxprune.graph.program import Fact, Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass


@dataclass(frozen=True)
class Entry:
    """One pass of a run: its text, its time, what it did, and the costs around it."""

    spec: str
    seconds: float
    outcome: Outcome
    before: Cost
    after: Cost


Observer = Callable[[Program, Entry], None]


@dataclass(frozen=True)
class Report:
    """What a pipeline did, pass by pass."""

    entries: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            f"{entry.spec:<40} {entry.outcome.changes:6d} changes "
            f"{entry.after.params:>13,} params, {entry.after.macs:>17,} MACs, {entry.seconds:.1f} s"
            for entry in self.entries
        )


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes that is known, before it runs, to be in a workable order.

    Raises:
        OrderError: a pass reads a fact that nothing before it gives.

    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: tuple[Pass, ...] | list[Pass]) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        self._check_order()

    def _check_order(self) -> None:
        known: Facts = frozenset()
        dropped: dict[Fact[Any], Pass] = {}
        for position, step in enumerate(self.passes, start=1):
            if missing := sorted(step.needs - known, key=lambda fact: fact.name):
                reasons = [
                    f"'{fact.name}', which the earlier pass {dropped[fact].name} does not keep"
                    if fact in dropped
                    else f"'{fact.name}', and no earlier pass gives it"
                    for fact in missing
                ]
                raise OrderError(f"pass {position}, {step.name}, reads {'; '.join(reasons)}")
            if step.acts:
                dropped |= dict.fromkeys(known - step.keeps - step.gives, step)
                known &= step.keeps
            known |= step.gives

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def run(
        self,
        program: Program,
        context: Context | None = None,
        observe: tuple[Observer, ...] = (),
        *,
        done: tuple[Entry, ...] = (),
    ) -> Report:
        """Run the passes in order on the program, in place.

        Args:
            program: what the passes rewrite.
            context: data, seed and the like; its dense program is a copy of ``program`` if absent.
            observe: called after every pass, once the program has been verified.
            done: the entries of the first passes, if the program has them behind it already.

        """
        context = context or Context()
        if context.dense is None:
            context = replace(context, dense=program.copy())
        if not context.recovery:
            quick = (step.for_trials() for step in self.passes)
            context = replace(context, recovery=tuple(step for step in quick if step is not None))
        entries = list(done)
        for step in self.passes[len(done) :]:
            before, start = cost(program), time.perf_counter()
            try:
                outcome = step(program, context)
            except BaseException as error:
                finished = ", ".join(entry.spec for entry in entries) or "nothing"
                error.add_note(f"in {step}, after {finished}")
                raise
            seconds = time.perf_counter() - start
            entries.append(Entry(str(step), seconds, outcome, before, cost(program)))
            for observer in observe:
                observer(program, entries[-1])
        return Report(tuple(entries))
