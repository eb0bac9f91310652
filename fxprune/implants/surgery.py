"""Putting implants into the graph: the outputs that stay, the implant, and one concat."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.graph.program import Program, shape_of
from fxprune.graph.surgery import (
    drop_unused,
    insert_call,
    read_tensor,
    rewrite_call,
    set_tensor,
    unused_name,
)
from fxprune.implants.implant_types import Implant, Site, Stage

aten = torch.ops.aten


def put_implant(program: Program, site: Site, rows: list[int], implant: Implant) -> None:
    """Let an implant compute some outputs of a layer, in place; call ``finish`` after the last.

    The call becomes the concat and keeps its name. Where the outputs lie in two runs, the one kept
    and the other implanted, nothing else is needed; more runs are slices of the two.

    Args:
        program: the program.
        site: the layer.
        rows: the outputs that the implant computes, ascending.
        implant: fitted to them.

    """
    total, dim = shape_of(site.node)[site.channel_dim], site.channel_dim
    implanted = torch.zeros(total, dtype=torch.bool)
    implanted[rows] = True
    if bool(implanted.all()):
        *first, last = implant.stages
        source = _chain(program, site, tuple(first), None)
        target, args = _call(program, site, last, source, (len(first), implant.bias))
        rewrite_call(program, site.node, target, args)
    else:
        made = {True: _chain(program, site, implant.stages, implant.bias),
                False: _kept(program, site, ~implanted)}  # fmt: skip
        pieces = _pieces(program, site.node, made, implanted.tolist(), dim)
        rewrite_call(program, site.node, aten.cat.default, (pieces, dim))


def finish(program: Program) -> None:
    """Drop the weights that implants replaced, and compute shapes anew."""
    drop_unused(program)
    program.refresh()


def _kept(program: Program, site: Site, keep: Tensor) -> fx.Node:
    """The layer as it is, with fewer outputs."""
    given = arguments(site.node)
    for part, name in (("weight", site.weight), ("bias", site.bias)):
        if name is not None:
            value = program.tensor(name)
            left = value.detach()[keep.to(value.device)].requires_grad_(value.requires_grad)
            given[part] = _store(program, site, f"kept_{part}", left)
    return insert_call(program, site.node, site.node.target, tuple(given.values()))  # type: ignore[arg-type]


def _chain(program: Program, site: Site, stages: tuple[Stage, ...], bias: Tensor | None) -> fx.Node:
    source: fx.Node = arguments(site.node)["input"]
    for number, stage in enumerate(stages):
        own = bias if stage is stages[-1] else None
        target, args = _call(program, site, stage, source, (number, own))
        source = insert_call(program, site.node, target, args)
    return source


def _call(
    program: Program, site: Site, stage: Stage, source: fx.Node, place: tuple[int, Tensor | None]
) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a stage and its arguments; place is its number and what it adds."""
    number, bias = place
    trained = program.tensor(site.weight).requires_grad
    weight = stage.weight.detach().contiguous().requires_grad_(trained)
    read = _store(program, site, f"implant{number}_weight", weight)
    added = None
    if bias is not None:
        value = bias.detach().clone().requires_grad_(trained)
        added = _store(program, site, f"implant{number}_bias", value)
    if not site.kernel:
        return aten.linear.default, (source, read, added)
    source, padding = _cropped(program, site, stage, source)
    operator = getattr(aten, f"conv{len(site.kernel)}d").default
    slides = (list(stage.stride), padding, list(stage.dilation), stage.groups)
    return operator, (source, read, added, *slides)


def _cropped(
    program: Program, site: Site, stage: Stage, source: fx.Node
) -> tuple[fx.Node, list[int]]:
    """Slice off what negative padding takes."""
    first = site.channel_dim + 1
    for offset, amount in enumerate(stage.padding):
        if amount < 0:
            args = (source, first + offset, -amount, amount)
            source = insert_call(program, site.node, aten.slice.Tensor, args)
    return source, [max(amount, 0) for amount in stage.padding]


def _store(program: Program, site: Site, leaf: str, value: Tensor) -> fx.Node:
    owner = site.weight.rpartition(".")[0]
    name = unused_name(program, f"{owner}.{leaf}" if owner else leaf)
    set_tensor(program, name, value)
    return read_tensor(program, name, before=site.node)


def _pieces(
    program: Program, before: fx.Node, made: dict[bool, fx.Node], implanted: list[bool], dim: int
) -> list[fx.Node]:
    """The runs of outputs in order: both values whole where there are two runs, else slices."""
    runs = [(which, len(list(run))) for which, run in groupby(implanted)]
    if len(runs) == 2:
        return [made[which] for which, _ in runs]
    start, pieces = {True: 0, False: 0}, []
    for which, length in runs:
        args = (made[which], dim, start[which], start[which] + length)
        pieces.append(insert_call(program, before, aten.slice.Tensor, args))
        start[which] += length
    return pieces
