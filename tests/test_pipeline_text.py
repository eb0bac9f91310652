from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import InputError, OrderError
from fxprune.graph.program import Fact, Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.text import Recipe, parse, read_recipe, write_recipe

SCORE: Fact[int] = Fact("score")


class Idle(Pass):
    def run(self, program: Program, context: Context) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class Score(Idle):
    name: ClassVar[str] = "score"
    gives: ClassVar[Facts] = frozenset({SCORE})

    criterion: Literal["trace", "taylor"] = "trace"
    probes: int = 64
    exact: bool = False


@dataclass(frozen=True)
class Cut(Idle):
    name: ClassVar[str] = "cut"
    needs: ClassVar[Facts] = frozenset({SCORE})

    macs: str | float | None = None
    protect: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.macs == 0:
            raise ValueError("macs must be above 0")


@dataclass(frozen=True)
class Scale(Idle):
    name: ClassVar[str] = "scale"

    by: float


KNOWN: Mapping[str, type[Pass]] = {step.name: step for step in (Score, Cut, Scale)}


@pytest.mark.parametrize(
    "text",
    [
        "score",
        "score{probes=8},cut",
        "score{criterion=taylor,exact=true},cut{macs=0.5}",
        'score,cut{macs="50%",protect=[head*,"a b"],ratios={"layer1.*"=0.25,x=1.0}}',
        "scale{by=-1e-05}",
    ],
)
def test_text_reads_back(text: str) -> None:
    pipeline = parse(text, KNOWN)
    again = parse(str(pipeline), KNOWN)
    assert again == pipeline
    assert read_recipe(write_recipe(Recipe(pipeline)), KNOWN).pipeline == pipeline


def test_white_space_and_snake_case_do_not_matter() -> None:
    assert parse(" score { probes = 8 } , cut", KNOWN) == parse("score{probes=8},cut", KNOWN)


def test_defaults_are_left_out() -> None:
    assert str(parse("score{probes=64},cut{macs=none}", KNOWN)) == "score,cut"


@pytest.mark.parametrize(
    ("text", "caret", "reason"),
    [
        ("score{probs=8}", 12, "in score: there is no option 'probs'; did you mean probes?"),
        ("score{probes=x}", 13, "in score: option 'probes': expected a whole number, not 'x'"),
        ("scor", 0, "there is no pass 'scor'; did you mean score?"),
        ("score cut", 6, "expected ',' between passes, found 'c'"),
        ("score,", 6, "expected the name of a pass"),
        ("scale", 0, "scale needs the option 'by'"),
        ("score,cut{macs=0}", 6, "in cut: macs must be above 0"),
    ],
)
def test_a_caret_stands_under_the_fault(text: str, caret: int, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, KNOWN)
    message = f"cannot parse the pipeline: {reason}\n    {text}\n    {' ' * caret}^"
    assert str(caught.value) == message


def test_order_is_checked() -> None:
    with pytest.raises(OrderError, match="pass 1, cut, reads 'score', and no earlier pass"):
        parse("cut,score", KNOWN)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6),
        st.none().map(lambda _: "none")
        | st.booleans()
        | st.integers(-(2**62), 2**62)
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8"), max_size=6)
        | st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_options_of_a_recipe_read_back(options: dict[str, object]) -> None:
    text = write_recipe(Recipe(Pipeline([Score()]), options))
    assert read_recipe(text, KNOWN).options == options


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run = ", "the recipe is not TOML"),
        ("[runs]\n", "the unknown section 'runs'"),
        ("[pass]\nname = 'score'\n", r"write \[\[pass\]\] in double brackets"),
        ("[[pass]]\nprobes = 3\n", "the recipe, pass 1: the key 'name' is missing"),
        ("[[pass]]\nname = 'scorer'\n", "the recipe, pass 1: there is no pass 'scorer'; did you"),
        ("[[pass]]\nname = 'score'\nprobes = 1.5\n", "'probes': expected a whole number"),
    ],
)
def test_a_wrong_recipe_says_where(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_recipe(text, KNOWN)
