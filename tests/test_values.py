from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import InputError
from fxprune.pipeline.values import Scanner, convert, show

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
CASES: tuple[tuple[Any, st.SearchStrategy[Any]], ...] = (
    (int, st.integers()),
    (float, st.floats(allow_nan=False)),
    (bool, st.booleans()),
    (str, TEXTS),
    (int | None, st.none() | st.integers()),
    (str | None, st.none() | TEXTS),
    (str | float | None, st.none() | TEXTS | st.floats(allow_nan=False)),
    (tuple[str, ...], st.lists(TEXTS, max_size=3).map(tuple)),
    (tuple[int, float], st.tuples(st.integers(), st.floats(allow_nan=False))),
    (Mapping[str, float], st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=3)),
    (Literal["a", "b-c"], st.sampled_from(["a", "b-c"])),
)


@given(st.data())
def test_what_is_shown_reads_back(data: st.DataObject) -> None:
    hint, values = data.draw(st.sampled_from(CASES))
    value = data.draw(values)
    text = show(value)
    scanner = Scanner(text, "text")
    again = convert(scanner.value(), hint)
    assert again == value
    assert type(again) is type(value)
    assert not scanner.peek()


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("50%", float, 0.5),
        ("1e3", int, 1000),
        ("1_000", int, 1000),
        ("a", tuple[str, ...], ("a",)),
        ("[ a , 'b' ]", tuple[str, ...], ("a", "'b'")),
        ('"none"', str | None, "none"),
        ("none", str | None, None),
        ('"50%"', str | float, "50%"),
        ("{a=1, b = 50%}", Mapping[str, float], {"a": 1.0, "b": 0.5}),
    ],
)
def test_reads(text: str, hint: Any, value: Any) -> None:
    assert convert(Scanner(text, "text").value(), hint) == value


@pytest.mark.parametrize(
    ("text", "hint", "reason"),
    [
        ("1.5", int, "expected a whole number, not '1.5'"),
        ("50%", int, "expected a whole number, not '50%'"),
        ("inf", int, "expected a whole number, not 'inf'"),
        ("yes", bool, "expected true or false, not 'yes'"),
        ("x", float, "expected a number or a percentage, not 'x'"),
        ("c", Literal["a", "b"], "expected one of a, b, not 'c'"),
        ("[1,2,3]", tuple[int, int], "expected 2 items, not 3"),
        ("1", Mapping[str, int], "expected a mapping such as {a=1,b=2}"),
        ("x", int | None, "expected a whole number, not 'x'"),
    ],
)
def test_refuses(text: str, hint: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        convert(Scanner(text, "text").value(), hint)


@pytest.mark.parametrize(
    ("text", "caret", "reason"),
    [
        ("[a", 2, "expected ',' or ']' in a list, found the end"),
        ('"abc', 0, "the quotation mark is not closed"),
        ("{a}", 2, "expected '=' after 'a', found '}'"),
        ("{a=1,a=2}", 5, "option 'a' is given twice"),
        ("{a=}", 3, "expected a value"),
        ("", 0, "expected a value"),
    ],
)
def test_a_caret_stands_under_the_fault(text: str, caret: int, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        Scanner(text, "here").value()
    assert str(caught.value) == f"here: {reason}\n    {text}\n    {' ' * caret}^"
