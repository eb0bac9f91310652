"""Options as text: how a value of a pass's field is written, scanned and given its type.

A bare word is a number, a percentage, ``true``, ``false``, ``none`` or a string, whichever its
field takes; ``[a,b]`` is a tuple, ``{a=1,b=2}`` a mapping, and what would be misread is quoted.
"""

from __future__ import annotations

import collections.abc
import difflib
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from fxprune.errors import InputError

BARE = re.compile(r'[^,{}\[\]="\s]+')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?%?|[+-]?(inf|nan)", re.IGNORECASE)
_BOOLS: Mapping[str, bool] = {"true": True, "false": False}


class Quoted(str):
    """A string that was written in quotes: never a number, ``true``, ``false`` or ``none``."""

    __slots__ = ()


class Scanner:
    """Reads text from left to right; every complaint shows the text with a caret at the fault."""

    def __init__(self, text: str, what: str) -> None:
        self.text = text
        self.what = what
        self.at = 0

    def fail(self, reason: str, at: int | None = None) -> InputError:
        """Return the error for a fault at a position, by default the present one."""
        at = self.at if at is None else at
        start, end = self.text.rfind("\n", 0, at) + 1, self.text.find("\n", at)
        line = self.text[start : None if end < 0 else end]
        return InputError(f"{self.what}: {reason}\n    {line}\n    {' ' * (at - start)}^")

    def peek(self) -> str:
        """Skip white space and return the next character, or the empty string at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, sign: str) -> bool:
        """Step over a sign if it comes next."""
        if self.peek() != sign:
            return False
        self.at += 1
        return True

    def expect(self, sign: str, where: str) -> None:
        """Step over a sign, or fail."""
        if not self.take(sign):
            found = f"'{self.peek()}'" if self.peek() else "the end"
            raise self.fail(f"expected '{sign}' {where}, found {found}")

    def word(self, meaning: str) -> str:
        """Read a bare word."""
        self.peek()
        if (match := BARE.match(self.text, self.at)) is None:
            raise self.fail(f"expected {meaning}")
        self.at = match.end()
        return match.group()

    def value(self) -> Any:
        """Read a value: strings, lists and dicts of them."""
        if self.peek() == '"':
            return self._quoted()
        if self.take("["):
            items: list[Any] = []
            while not self.take("]"):
                if items:
                    self.expect(",", "or ']' in a list")
                items.append(self.value())
            return items
        if self.peek() == "{":
            return {key: value for key, value, _ in self.options()}
        return self.word("a value")

    def _quoted(self) -> Quoted:
        if (match := _QUOTED.match(self.text, self.at)) is None:
            raise self.fail("the quotation mark is not closed")
        try:
            text = json.loads(match.group())
        except ValueError as error:
            raise self.fail(f"the quoted text is invalid ({error})") from error
        self.at = match.end()
        return Quoted(text)

    def options(self) -> list[tuple[str, Any, int]]:
        """Read ``{name=value,...}`` as triples of name, value and the position of the value."""
        self.expect("{", "before options")
        found: list[tuple[str, Any, int]] = []
        while not self.take("}"):
            if found:
                self.expect(",", "or '}' after an option")
            self.peek()
            start = self.at
            name = self._quoted() if self.peek() == '"' else self.word("the name of an option")
            if name in {known for known, _, _ in found}:
                raise self.fail(f"option '{name}' is given twice", start)
            self.expect("=", f"after '{name}'")
            self.peek()
            place = self.at
            found.append((str(name), self.value(), place))
        return found


def show(value: object) -> str:
    """Write a value so that ``convert`` of what ``Scanner.value`` reads gives it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, collections.abc.Mapping):
        return "{" + ",".join(f"{show(key)}={show(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return str(value)
    misread = value in ("none", *_BOOLS) or _NUMBER.fullmatch(value)
    if BARE.fullmatch(value) and not misread:
        return value
    return json.dumps(value, ensure_ascii=False)


def convert(value: Any, hint: Any) -> Any:
    """Give a scanned or TOML value the type of its field.

    Raises:
        ValueError: it does not have that type; the message says what was expected.

    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if members := _members(hint):
        return _convert_union(value, members)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"expected one of {', '.join(map(str, inner))}, not '{value}'")
        return inner[inner.index(value)]
    if origin in (tuple, list, collections.abc.Sequence):
        return _convert_items(value, hint)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise ValueError("expected a mapping such as {a=1,b=2}")
        return {convert(Quoted(key), inner[0]): convert(v, inner[1]) for key, v in value.items()}
    return _convert_scalar(value, hint)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values that a ``Literal``, alone or in a union, lists; none for other types.

    >>> choices_of(Literal["heads", "head_dim"] | None)
    ('heads', 'head_dim')
    """
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for member in _members(hint) for value in choices_of(member))


def check_choice(option: str, value: Any, hint: Any) -> None:
    """Fail unless a value is one of those that its hint lists, or of another type in the hint.

    Raises:
        InputError: it is not; the message names ``option``, all values and the nearest one.

    """
    choices = choices_of(hint)
    if not choices or value in choices:
        return
    others = [member for member in _members(hint) if not choices_of(member)]
    if any(_is_a(value, member) for member in others):
        return
    near = difflib.get_close_matches(str(value), map(str, choices), n=1, cutoff=0.5)
    advice = f"; did you mean '{near[0]}'?" if near else ""
    raise InputError(
        f"{option} is '{value}'; it must be one of {', '.join(map(str, choices))}{advice}"
    )


def type_text(hint: Any) -> str:
    """Return what values a hint takes, for people; for a ``Literal`` all of them.

    >>> type_text(int | None), type_text(Literal["a", "b"]), type_text(tuple[str, ...])
    ('whole number or none', 'one of a, b', 'list of text')
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        values = ", ".join(map(str, inner))
        return values if len(inner) == 1 else f"one of {values}"
    if members := _members(hint):
        return " or ".join(type_text(member) for member in members)
    if origin in (tuple, list, collections.abc.Sequence):
        return f"list of {type_text(inner[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"mapping from {type_text(inner[0])} to {type_text(inner[1])}"
    names = {bool: "true or false", str: "text", int: "whole number", float: "number"}
    return "none" if hint is types.NoneType else names.get(hint, getattr(hint, "__name__", "any"))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def _is_a(value: Any, member: Any) -> bool:
    kinds = (int, float) if member is float else get_origin(member) or member
    return isinstance(value, kinds)


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    order = (types.NoneType, bool, int, float)
    ranked = sorted(members, key=lambda member: (member is str, _position(member, order)))
    reasons = []
    for member in ranked:
        try:
            return convert(value, member)
        except ValueError as error:
            if member is not types.NoneType:
                reasons.append(str(error))
    raise ValueError("; or ".join(reasons))


def _position(member: Any, order: tuple[Any, ...]) -> int:
    return order.index(member) if member in order else len(order)


def _convert_items(value: Any, hint: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        value = [value]  # one item needs no brackets
    kinds, make = get_args(hint), list if get_origin(hint) is list else tuple
    if make is list or len(kinds) == 1 or (len(kinds) == 2 and kinds[1] is Ellipsis):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"expected {len(kinds)} items, not {len(value)}")
    return make(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def _convert_scalar(value: Any, hint: Any) -> Any:
    text = isinstance(value, str) and not isinstance(value, Quoted)
    if hint is types.NoneType and text and value == "none":
        return None
    if hint is bool and (isinstance(value, bool) or (text and value in _BOOLS)):
        return _BOOLS[value] if text else value
    if hint is str and isinstance(value, str):
        return str(value)
    if hint in (int, float) and not isinstance(value, (bool, Quoted, list, dict)):
        return _number(value, hint)
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    raise ValueError(f"expected {names.get(hint, getattr(hint, '__name__', hint))}, not '{value}'")


def _number(value: Any, hint: type[int] | type[float]) -> int | float:
    wanted = "a whole number" if hint is int else "a number or a percentage"
    text = str(value).replace("_", "")
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"expected {wanted}, not '{value}'")
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if hint is float:
        return number
    if not math.isfinite(number) or text.endswith("%") or number != int(number):
        raise ValueError(f"expected {wanted}, not '{value}'")
    return int(number) if not re.fullmatch(r"[+-]?\d+", text) else int(text)
