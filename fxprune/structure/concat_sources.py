"""Joins: which nodes make the channels of a value, where a concat joins them or slices of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.program import shape_of

aten = torch.ops.aten


def makers(value: fx.Node) -> dict[fx.Node, Tensor]:
    """Return, by node, which channel of a value (dimension 1) each of its channels is; -1: none.

    A value that no concat makes is its own maker. Of a concat, the makers are its parts, or what
    its parts are slices of.
    """
    found: dict[fx.Node, Tensor] = {}
    offset = 0
    for part in _parts(value):
        source, start, stop = _bounds(part)
        channels = found.setdefault(source, torch.full((_channels(source),), -1))
        channels[start:stop] = torch.arange(offset, offset + stop - start)
        offset += stop - start
    return found


def read_elsewhere(value: fx.Node) -> fx.Node | None:
    """Return a node whose value is read by others than the one reader of a join, if there is one.

    Such are makers, slices and the join itself; a maker of whose channels some are left out, or
    taken twice, counts as well.
    """
    parts = _parts(value)
    if len(value.users) > 1:
        return value
    found = makers(value)
    taken = sum(len(channels) for channels in found.values())
    for source, channels in found.items():
        between = {part for part in parts if _bounds(part)[0] is source} | {value}
        others = set(source.users) - between if source is not value else set()
        if others or bool((channels < 0).any()) or taken != _channels(value):
            return source
    loose = (part for part in parts if part is not value and set(part.users) - {value})
    return next((part for part in loose if part not in found), None)


def _channels(value: fx.Node) -> int:
    shape = shape_of(value)
    return shape[1] if len(shape) > 1 else 0


def _parts(value: fx.Node) -> list[Any]:
    if value.target is aten.cat.default and value.args[1:] == (1,):
        return list(value.args[0])  # type: ignore[arg-type]
    return [value]


def _bounds(part: fx.Node) -> tuple[fx.Node, int, int]:
    """What a slice of channels is of, and its first channel and the one after its last."""
    size = _channels(part)
    if part.target is not aten.slice.Tensor or len(part.args) != 4 or part.args[1] != 1:
        return part, 0, size
    source, _, start, _ = part.args
    assert isinstance(source, fx.Node)
    assert isinstance(start, int)
    return source, start, start + size
