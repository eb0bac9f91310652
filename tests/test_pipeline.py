from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from fxprune.errors import (
    FxpruneError,
    InputError,
    OrderError,
    PostconditionError,
    PreconditionError,
)
from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.program import Fact, Program
from fxprune.graph.trace import trace
from fxprune.passes import FoldBatchNorm, RecalibrateNorms, Reconstruct
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.pipeline.driver import Entry, Pipeline

SCORE: Fact[int] = Fact("score")
PLAN: Fact[int] = Fact("plan")


@dataclass(frozen=True)
class Score(Pass):
    name: ClassVar[str] = "score"
    acts: ClassVar[bool] = False
    gives: ClassVar[Facts] = frozenset({SCORE})

    def run(self, program: Program, context: Context) -> Outcome:
        program.put(SCORE, 1)
        return Outcome()


@dataclass(frozen=True)
class Plan(Pass):
    name: ClassVar[str] = "plan"
    acts: ClassVar[bool] = False
    needs: ClassVar[Facts] = frozenset({SCORE})
    gives: ClassVar[Facts] = frozenset({PLAN})

    def run(self, program: Program, context: Context) -> Outcome:
        program.put(PLAN, 2)
        return Outcome()


@dataclass(frozen=True)
class Shift(Pass):
    name: ClassVar[str] = "shift"

    by: float = 1.0
    places: int = 1

    def run(self, program: Program, context: Context) -> Outcome:
        with torch.no_grad():
            program.tensor("bias").add_(self.by)
        return Outcome(self.places)


@dataclass(frozen=True)
class Keep(Shift):
    name: ClassVar[str] = "keep"
    keeps: ClassVar[Facts] = frozenset({SCORE})


@dataclass(frozen=True)
class Fail(Pass):
    name: ClassVar[str] = "fail"

    def run(self, program: Program, context: Context) -> Outcome:
        raise FxpruneError("no luck")


@pytest.fixture
def program() -> Program:
    return trace(nn.Linear(3, 2), (torch.ones(1, 3),))


def test_facts_flow_and_costs_are_noted(program: Program) -> None:
    report = Pipeline([Score(), Plan(), Shift(by=2.0)]).run(program)
    assert [entry.spec for entry in report.entries] == ["score", "plan", "shift{by=2.0}"]
    assert {entry.after.params for entry in report.entries} == {8}
    assert "shift{by=2.0}" in str(report)


def test_a_change_drops_facts_that_are_not_kept(program: Program) -> None:
    Pipeline([Score(), Plan(), Keep()]).run(program)
    assert set(program.facts) == {"score"}


def test_no_change_drops_nothing(program: Program) -> None:
    Pipeline([Score(), Shift(places=0)]).run(program)
    assert set(program.facts) == {"score"}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Plan()], "pass 1, plan, reads 'score', and no earlier pass gives it"),
        (
            [Score(), Shift(), Plan()],
            "pass 3, plan, reads 'score', which the earlier pass shift does not",
        ),
    ],
)
def test_a_wrong_order_is_refused_when_built(steps: list[Pass], reason: str) -> None:
    with pytest.raises(OrderError, match=reason):
        Pipeline(steps)


def test_a_deciding_pass_keeps_the_facts_before_it() -> None:
    assert len(Pipeline([Score(), Score(), Plan(), Plan()]).passes) == 4


def test_a_pass_alone_checks_its_facts(program: Program) -> None:
    with pytest.raises(PreconditionError, match="plan reads score, which"):
        Plan()(program, Context())


def test_an_error_says_where(program: Program) -> None:
    with pytest.raises(FxpruneError, match="no luck") as caught:
        Pipeline([Score(), Fail()]).run(program)
    assert caught.value.__notes__ == ["in fail, after score"]


def test_the_dense_model_is_kept_aside(program: Program) -> None:
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Look(Pass):
        name: ClassVar[str] = "look"

        def run(self, program: Program, context: Context) -> Outcome:
            assert context.dense is not None
            seen.append(context.dense.tensor("bias") - program.tensor("bias"))
            return Outcome()

    Pipeline([Shift(), Look()]).run(program)
    assert torch.allclose(seen[0], torch.tensor([-1.0, -1.0]))


def test_goes_on_after_what_is_done(program: Program) -> None:
    pipeline = Pipeline([Score(), Plan(), Shift()])
    entries: list[Entry] = []

    def stop(program: Program, entry: Entry) -> None:
        entries.append(entry)
        if len(entries) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(program, observe=(stop,))
    assert set(program.facts) == {"score", "plan"}
    report = pipeline.run(program, done=tuple(entries))
    assert [entry.spec for entry in report.entries] == ["score", "plan", "shift"]


def test_passes_that_try_plans_get_quick_forms_of_those_that_restore_accuracy(
    program: Program,
) -> None:
    seen: list[tuple[object, ...]] = []

    @dataclass(frozen=True)
    class Trying(Pass):
        name: ClassVar[str] = "trying"

        def run(self, program: Program, context: Context) -> Outcome:
            seen.append(context.recovery)
            return Outcome()

    norms, layers = RecalibrateNorms(samples=2000), Reconstruct(samples=100, lookahead=2)
    with contextlib.suppress(InputError):  # there is no data to re-fit on
        Pipeline([Trying(), norms, FoldBatchNorm(), layers]).run(program)
    assert seen == [(RecalibrateNorms(samples=256), Reconstruct(samples=100))]


def test_what_a_pass_ensures_is_checked(program: Program) -> None:
    @dataclass(frozen=True)
    class Promise(Shift):
        def ensures(
            self, program: Program, context: Context, outcome: Outcome
        ) -> Iterator[tuple[str, bool]]:
            yield "the first bias is small", float(program.tensor("bias").detach()[0].abs()) < 100

    assert Promise(by=1.0)(program, Context()).changes == 1
    with pytest.raises(
        PostconditionError, match=r"shift did not do .* \(the first bias is small\)"
    ):
        Promise(by=1000.0)(program, Context())


def test_a_pass_that_records_no_fact_is_caught(program: Program) -> None:
    @dataclass(frozen=True)
    class Forgets(Shift):
        gives: ClassVar[Facts] = frozenset({SCORE})

    with pytest.raises(PostconditionError, match="it records the fact score"):
        Forgets()(program, Context())


def test_masked_weights_stay_zero(program: Program) -> None:
    with torch.no_grad():
        program.tensor("bias").zero_()
    program.put(MASKS, Masks({"bias": torch.tensor([True, False])}, "half"))

    @dataclass(frozen=True)
    class Keeps(Shift):
        keeps: ClassVar[Facts] = frozenset({MASKS})

    assert Keeps(by=0.0)(program, Context()).changes == 1
    with pytest.raises(PostconditionError, match="masked weights of bias at zero"):
        Keeps(by=1.0)(program, Context())


@dataclass(frozen=True)
class Chooses(Pass):
    name: ClassVar[str] = "chooses"

    way: Literal["left", "right"] = "left"
    how_far: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.how_far != "auto" and self.how_far < 0:
            raise InputError("how-far must not be negative")

    def run(self, program: Program, context: Context) -> Outcome:
        return Outcome()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"way": "lefft"}, "chooses: way is 'lefft'; .* one of left, right; did you mean 'left'"),
        ({"way": None}, "way is 'None'; it must be one of left, right$"),
        ({"how_far": "atuo"}, "how-far is 'atuo'; it must be one of auto; did you mean 'auto'"),
        ({"how_far": -1}, "must not be negative"),
    ],
)
def test_choices_are_checked_where_a_pass_is_made(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Chooses(**options)
    with pytest.raises(InputError, match=reason):
        replace(Chooses(), **options)


def test_choices_that_are_right_pass() -> None:
    assert (Chooses(), Chooses("right", 3), Chooses(how_far=0.5)) == (
        Chooses("left", "auto"),
        Chooses("right", 3.0),
        Chooses(how_far=0.5),
    )
