"""Pipelines as text, ``annotate-sensitivity{probes=64},plan-channels{macs=50%}``, and as TOML.

A recipe says the same as the text, one table per pass, and may carry the options of the run::

    [run]
    seed = 0

    [[pass]]
    name = "plan-channels"
    macs = "50%"
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

from fxprune.errors import FxpruneError, InputError
from fxprune.pipeline.contract import Pass, default_of
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.values import Quoted, Scanner, convert

Known = Mapping[str, type[Pass]]


def parse(text: str, known: Known) -> Pipeline:
    """Read a pipeline from text; ``parse(str(pipeline), known) == pipeline``.

    Raises:
        InputError: the text is wrong; the message shows it with a caret under the fault.
        OrderError: the passes are in an order that cannot work.

    """
    scanner = Scanner(text, "cannot parse the pipeline")
    steps = [_parse_pass(scanner, known)]
    while scanner.peek():
        scanner.expect(",", "between passes")
        steps.append(_parse_pass(scanner, known))
    return Pipeline(steps)


def _parse_pass(scanner: Scanner, known: Known) -> Pass:
    scanner.peek()
    start = scanner.at
    name = scanner.word("the name of a pass")
    if name not in known:
        raise scanner.fail(_unknown("pass", name, known), start)
    options = scanner.options() if scanner.peek() == "{" else []
    places = {option: place for option, _, place in options}
    try:
        return make(known[name], {option: value for option, value, _ in options})
    except OptionError as error:
        raise scanner.fail(str(error), places.get(error.option, start)) from error


class OptionError(InputError):
    """An option that a pass does not have, or a value that it does not take."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def make(
    kind: type[Pass], options: Mapping[str, Any], read: Callable[[Any, Any], Any] = convert
) -> Pass:
    """Make a pass from its options (kebab or snake case), each given its field's type by ``read``.

    Raises:
        OptionError: the pass does not take them; the message names the option.

    """
    hints = get_type_hints(kind)
    names = {option.name.replace("_", "-"): option.name for option in fields(kind)}
    values: dict[str, Any] = {}
    for option, value in options.items():
        if (kebab := option.replace("_", "-")) not in names:
            raise OptionError(option, f"in {kind.name}: {_unknown('option', option, names)}")
        try:
            values[names[kebab]] = read(value, hints[names[kebab]])
        except ValueError as error:
            raise OptionError(option, f"in {kind.name}: option '{kebab}': {error}") from error
    for kebab, name in names.items():
        if name not in values and default_of(kind.__dataclass_fields__[name]) is MISSING:
            raise OptionError("", f"{kind.name} needs the option '{kebab}'")
    try:
        return kind(**values)
    except (FxpruneError, ValueError) as error:
        raise OptionError("", f"in {kind.name}: {error}") from error


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    if near := difflib.get_close_matches(name, known, n=2, cutoff=0.5):
        return f"there is no {what} '{name}'; did you mean {' or '.join(near)}?"
    return f"there is no {what} '{name}'; known: {', '.join(sorted(known)) or 'none'}"


@dataclass(frozen=True)
class Recipe:
    """A pipeline, if one is given, and the options of the run by name."""

    pipeline: Pipeline | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_recipe(text: str, known: Known, name: str = "the recipe") -> Recipe:
    """Read a recipe from TOML.

    Raises:
        InputError: the recipe is wrong; the message says where.

    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not TOML: {error}") from error
    if extra := sorted(set(content) - {"run", "pass"}):
        raise InputError(
            f"{name} has the unknown section '{extra[0]}'; the sections are [run] and [[pass]]"
        )
    tables, run = content.get("pass", []), content.get("run", {})
    if not isinstance(tables, list) or not isinstance(run, dict):
        raise InputError(f"{name}: write [[pass]] in double brackets and [run] in single ones")
    steps = [_read_pass(table, known, f"{name}, pass {n}") for n, table in enumerate(tables, 1)]
    return Recipe(Pipeline(steps) if steps else None, run)


def _read_pass(table: Mapping[str, Any], known: Known, where: str) -> Pass:
    options = dict(table)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"{where}: the key 'name' is missing or not text")
    if name not in known:
        raise InputError(f"{where}: {_unknown('pass', name, known)}")
    try:
        return make(known[name], options, _from_toml)
    except OptionError as error:
        raise InputError(f"{where}: {error}") from error


def _from_toml(value: Any, hint: Any) -> Any:
    """Give a TOML value its field's type: a string stays one where the field takes strings."""
    try:
        return convert(_quoted(value), hint)
    except ValueError:
        return convert(value, hint)


def _quoted(value: Any) -> Any:
    match value:
        case str():
            return value if value == "none" else Quoted(value)
        case list():
            return [_quoted(item) for item in value]
        case dict():
            return {key: _quoted(item) for key, item in value.items()}
    return value


def write_recipe(recipe: Recipe) -> str:
    """Write a recipe as TOML; ``read_recipe`` gives an equal one back."""
    lines: list[str] = []
    if recipe.options:
        lines += ["[run]", *_table(recipe.options), ""]
    for step in recipe.pipeline or ():
        changed = {
            option.name.replace("_", "-"): getattr(step, option.name)
            for option in fields(step)
            if getattr(step, option.name) != default_of(option)
        }
        lines += ["[[pass]]", *_table({"name": step.name} | changed), ""]
    return "\n".join(lines)


def _table(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_toml(value)}" for key, value in values.items()]


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if plain else _toml(key)


def _toml(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_table(value)) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)
