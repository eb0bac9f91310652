"""Passes and pipelines: the contract of a pass and the driver that runs several."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar, final

from fxprune.context import Context
from fxprune.errors import OrderError, PreconditionError
from fxprune.graph.program import Fact, Program
from fxprune.planning.cost import Cost, cost
from fxprune.text.values import show

Facts = frozenset[Fact[Any]]


@dataclass(frozen=True)
class Skip:
    """A place that a pass declined, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Attributes:
        changes: how many places it changed.
        skips: the places it declined.
        details: anything else worth a line in the report, as plain values (str, int, float,
            bool, None, and lists and dicts of them).

    """

    changes: int = 0
    skips: tuple[Skip, ...] = ()
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite of a program, in place. Its dataclass fields are its options.

    A pass is handed a program that verifies and leaves one that verifies. ``needs`` are the facts
    it reads, ``gives`` those it establishes, ``keeps`` those that survive its changes; every other
    fact is dropped, but only if something changed. A pass that only decides, and never changes the
    program, says so with ``acts = False``.
    """

    name: ClassVar[str]
    acts: ClassVar[bool] = True
    needs: ClassVar[Facts] = frozenset()
    gives: ClassVar[Facts] = frozenset()
    keeps: ClassVar[Facts] = frozenset()

    @abstractmethod
    def run(self, program: Program, context: Context) -> Outcome:
        """Rewrite the program in place, or record a fact on it."""

    @final
    def __call__(self, program: Program, context: Context) -> Outcome:
        """Check the facts it needs, run, drop stale facts, verify.

        Raises:
            PreconditionError: a fact that the pass reads is not there.
            PostconditionError: the pass left a program that does not verify.

        """
        missing = sorted(fact.name for fact in self.needs if fact.name not in program.facts)
        if missing:
            raise PreconditionError(
                f"{self.name} needs {', '.join(missing)}; run the pass that gives it first"
            )
        outcome = self.run(program, context)
        if outcome.changes:
            survivors = {fact.name for fact in self.keeps | self.gives}
            program.facts = {k: v for k, v in program.facts.items() if k in survivors}
        program.verify()
        return outcome

    def __str__(self) -> str:
        changed = [
            f"{field.name.replace('_', '-')}={show(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != default_of(field)
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name


def default_of(field: Field[Any]) -> object:
    """Return the default of a pass's option, or ``dataclasses.MISSING`` if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


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
                    f"'{fact.name}', which {dropped[fact].name} before it does not keep"
                    if fact in dropped
                    else f"'{fact.name}', and nothing before it gives that"
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
