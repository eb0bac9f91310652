"""The contract of a pass: its options, the facts it reads and leaves, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, final

from fxprune.errors import PreconditionError
from fxprune.graph.program import Fact, Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.values import show

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

    def for_trials(self) -> Pass | None:
        """Return a quick form of this pass if it restores accuracy after removal, else None.

        Passes that try several plans run the quick forms of the pipeline's later passes on each.
        """
        return None

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
