"""The contract of a pass: its options, the facts it reads and leaves, and what it reports."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, final, get_type_hints

from fxprune.errors import PostconditionError, PreconditionError
from fxprune.graph.facts import FROZEN, MASKS
from fxprune.graph.program import Fact, Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.values import check_choice, choices_of, show

Facts = frozenset[Fact[Any]]


@dataclass(frozen=True)
class Skip:
    """A place that a pass declined, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class ReportTable:
    """What a pass found, as a table for the report: every row has one text per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Attributes:
        changes: how many places it changed.
        skips: the places it declined.
        details: figures for report.json, as plain values; nothing in fxprune reads them.
        notes: sentences for the user, such as a departure from what was asked.
        tables: what the report shows of the pass.
        predicted: the costs that the pass expects of the final program, by quantity.

    """

    changes: int = 0
    skips: tuple[Skip, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite of a program, in place. Its dataclass fields are its options.

    A pass is handed a program that verifies and leaves one that verifies. ``needs`` are the facts
    it reads, ``gives`` those it establishes, ``keeps`` those that survive its changes; every other
    fact is dropped, but only if something changed. A pass that only decides, and never changes the
    program, says so with ``acts = False``. ``repeats`` says why a second run on the pass's own
    result changes the program again; None promises that it does not.
    """

    name: ClassVar[str]
    acts: ClassVar[bool] = True
    needs: ClassVar[Facts] = frozenset()
    gives: ClassVar[Facts] = frozenset()
    keeps: ClassVar[Facts] = frozenset()
    repeats: ClassVar[str | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let every pass check its choices first, also one with a ``__post_init__`` of its own."""
        super().__init_subclass__(**keywords)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Pass) -> None:
                Pass.__post_init__(self)
                own(self)

            setattr(cls, "__post_init__", checked)  # noqa: B010  # mypy: a method

    def __post_init__(self) -> None:
        """Refuse a value that an option's ``Literal`` does not list."""
        for option, hint in _choices(type(self)).items():
            check_choice(f"{self.name}: {option.replace('_', '-')}", getattr(self, option), hint)

    @abstractmethod
    def run(self, program: Program, context: Context) -> Outcome:
        """Rewrite the program in place, or record a fact on it."""

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Yield what holds of the program after ``run``: a statement, and whether it is true.

        Every call of the pass checks them, so they must be cheap: no model is run.
        """
        yield from ()

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
            PostconditionError: the pass left a program that does not verify, or one of which
                something that the pass ensures is not true.

        """
        missing = sorted(fact.name for fact in self.needs if fact.name not in program.facts)
        if missing:
            raise PreconditionError(
                f"{self.name} reads {', '.join(missing)}, which the program does not have; run the "
                "pass that records it first"
            )
        outcome = self.run(program, context)
        if outcome.changes:
            survivors = {fact.name for fact in self.keeps | self.gives | {FROZEN}}
            program.facts = {k: v for k, v in program.facts.items() if k in survivors}
        program.verify()
        self._check_promises(program, context, outcome)
        return outcome

    def _check_promises(self, program: Program, context: Context, outcome: Outcome) -> None:
        """Fail unless the program is what the pass promises."""
        given = [(f"it records the fact {f.name}", f.name in program.facts) for f in self.gives]
        given = given if outcome.changes else []
        promised = [*given, *_masks_hold(program), *self.ensures(program, context, outcome)]
        broken = [statement for statement, holds in promised if not holds]
        if broken:
            raise PostconditionError(
                f"{self.name} did not do what it promises ({broken[0]}); leave it out of the "
                "pipeline, and please report this with the model"
            )

    def __str__(self) -> str:
        changed = [
            f"{field.name.replace('_', '-')}={show(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != default_of(field)
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name


@functools.cache
def _choices(kind: type[Pass]) -> Mapping[str, Any]:
    """By option, the types of those whose values are listed."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind) if choices_of(hints[one.name])}


def _masks_hold(program: Program) -> Iterator[tuple[str, bool]]:
    """Yield for every mask that its weights are still zero, as facts promise to later passes."""
    masks = program.facts.get(MASKS.name)
    stored = program.graph_module.state_dict() if masks is not None else {}
    for name, keep in masks.keep.items() if masks is not None else ():
        weight = stored.get(name)
        if weight is not None and weight.shape == keep.shape:
            holds = not bool(weight[~keep.to(weight.device)].any())
            yield f"it keeps the masked weights of {name} at zero", holds


def default_of(field: Field[Any]) -> object:
    """Return the default of a pass's option, or ``dataclasses.MISSING`` if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()
