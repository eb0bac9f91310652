"""Arguments of the public functions: ordinary mistakes are answered with the right form."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.values import check_choice

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check names, models, pipelines and choices of a function's arguments before it runs.

    The signature stays what it is, for editors, type checkers and ``inspect.signature``.
    """
    signature = inspect.signature(function)
    name = f"fxprune.{function.__name__}"

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [word for word in kwargs if word not in signature.parameters]:
            raise InputError(f"{name} has no option '{unknown[0]}'; {_near(unknown[0], signature)}")
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"{name}: {error}; it is {name}{_brief(signature)}") from error
        for option, hint in _hints(function).items():
            if option in given:
                _check(name, option, given[option], hint)
        return function(*args, **kwargs)

    return wrapper


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _near(word: str, signature: inspect.Signature) -> str:
    options = list(signature.parameters)
    if near := difflib.get_close_matches(word, options, n=2, cutoff=0.6):
        return f"did you mean {' or '.join(near)}?"
    return f"it has {', '.join(options)}"


def _brief(signature: inspect.Signature) -> str:
    required = [
        name for name, one in signature.parameters.items() if one.default is inspect.Parameter.empty
    ]
    return f"({', '.join([*required, '...'])})"


def _check(function: str, option: str, value: Any, hint: Any) -> None:
    kinds = tuple(kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type))
    plain = len(kinds) == len(typing.get_args(hint) or (hint,))
    special = {Program, nn.Module, Pipeline} & set(kinds)
    if special and not isinstance(value, kinds):
        raise InputError(f"{function}: {_advice(option, value, kinds)}")
    if plain and set(kinds) <= set(_WORDS) and not any(_is_a(value, kind) for kind in kinds):
        wanted = " or ".join(_WORDS[kind] for kind in kinds)
        raise InputError(f"{function}: {option} is {value!r}; it must be {wanted}")
    check_choice(f"{function}: {option}", value, hint)


_WORDS: Mapping[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "None",
}


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; numbers of NumPy are numbers."""
    kinds = {int: numbers.Integral, float: numbers.Real}
    return isinstance(value, kinds.get(kind, kind))


def _advice(option: str, value: Any, kinds: Iterable[type]) -> str:
    if Pipeline in kinds:
        return (
            f"{option} is a {type(value).__name__}; write {option}=fxprune.Pipeline([...]) with "
            f"passes of fxprune.passes, or text such as {option}='recalibrate-norms,fold-batchnorm'"
        )
    if isinstance(value, (str, Path)):
        return (
            f"{option} is the path '{value}', not a model; load it first with "
            f"fxprune.load_model('{value}'), and name its architecture, such as "
            "'torchvision:resnet50', if the file holds weights only"
        )
    if isinstance(value, nn.Module):
        return (
            f"{option} is a module; trace it first with fxprune.trace(module, example_inputs), "
            "where example_inputs is a tuple of tensors"
        )
    names = {nn.Module: "torch.nn.Module", Program: "fxprune.Program", type(None): "None"}
    wanted = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
    return f"{option} is a {type(value).__name__}; it must be {wanted}"
