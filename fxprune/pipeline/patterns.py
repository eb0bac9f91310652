"""Name patterns: what a user means by ``head.*``; a pattern that matches nothing is refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from fxprune.errors import InputError
from fxprune.graph.program import Program

T = TypeVar("T")


def select(
    patterns: Iterable[str], names: Mapping[T, Collection[str]], option: str, what: str
) -> dict[str, frozenset[T]]:
    """Return by pattern what it matches; ``*``, ``?`` and ``[]`` are wildcards, case matters.

    Args:
        patterns: as users write them.
        names: what may be meant, and by which names.
        option: whose patterns they are, for messages, such as ``sparsify{protect}``.
        what: what is selected from, for messages, such as ``layer``.

    Raises:
        InputError: a pattern matches nothing; the message suggests the nearest names.

    """
    return {pattern: _matches(pattern, names, option, what) for pattern in patterns}


def select_any(
    patterns: Iterable[str], names: Mapping[T, Collection[str]], option: str, what: str
) -> frozenset[T]:
    """Return what at least one of the patterns matches; see ``select``."""
    return frozenset[T]().union(*select(patterns, names, option, what).values())


def tensor_names(program: Program) -> dict[str, tuple[str, ...]]:
    """Return for each parameter and buffer what it can be called: its own name, its module's."""
    return {name: names_of_tensor(name) for name in program.graph_module.state_dict()}


def names_of_tensor(tensor: str) -> tuple[str, ...]:
    """Return a tensor's name and, if it has one, its module's.

    >>> names_of_tensor("layer1.conv.weight"), names_of_tensor("scale")
    (('layer1.conv.weight', 'layer1.conv'), ('scale',))
    """
    module = tensor.rpartition(".")[0]
    return (tensor, module) if module else (tensor,)


def _matches(
    pattern: str, names: Mapping[T, Collection[str]], option: str, what: str
) -> frozenset[T]:
    found = frozenset(
        thing for thing, own in names.items() if any(fnmatchcase(name, pattern) for name in own)
    )
    if not found:
        every = list(dict.fromkeys(name for own in names.values() for name in own))
        raise InputError(f"{option}: no {what} matches '{pattern}'; {_nearest(pattern, every)}")
    return found


def _nearest(pattern: str, names: Collection[str]) -> str:
    bare = pattern.strip("*?.") or pattern
    if near := difflib.get_close_matches(bare, names, n=3, cutoff=0.4):
        return f"did you mean {' or '.join(near)}?"
    shown = ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"the names are {shown}" if names else "there is none in this model"
