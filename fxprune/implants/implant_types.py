"""Implants: cheaper operators for some outputs of a convolution or linear layer.

A layer's input is spread into features ``f`` (channels times taps), its weight into rows ``W`` of
as many columns. An implant computes some of the rows of ``W f + b`` in one or two stages:

    pointwise    a 1 x 1 convolution of the centre tap
    depthwise    a k x k convolution of every channel alone, then a 1 x 1
    pair         a k x 1 convolution to ``rank`` channels, then a 1 x k
    low-rank     the layer itself with ``rank`` outputs, then a 1 x 1 (for a linear layer: a linear)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from fxprune.errors import InputError
from fxprune.graph.node_args import arguments, paddings, spread
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of

aten = torch.ops.aten
Name = Literal["pointwise", "depthwise", "pair", "low-rank"]
NAMES: tuple[Name, ...] = get_args(Name)
RANKED = ("pair", "low-rank")


@dataclass(frozen=True)
class Kind:
    """What an implant consists of.

    Attributes:
        name: one of ``NAMES``.
        rank: the channels between the stages of a pair or low-rank implant; else 0.

    >>> str(Kind.parse("low-rank:8"))
    'low-rank:8'

    """

    name: Name
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.rank}" if self.name in RANKED else self.name

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Read what ``str`` wrote.

        Raises:
            InputError: it is no kind of implant.

        """
        name, _, rank = text.partition(":")
        if name not in NAMES or (name in RANKED) != rank.isdecimal():
            raise InputError(f"'{text}' is not a type of implant; the types are {', '.join(NAMES)}")
        return cls(name, int(rank or 0))


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that implants may partly replace.

    Attributes:
        node: the call.
        weight: the name of its weight, outputs x channels x taps.
        bias: the name of its bias, if it has one.
        channels: how many it reads.
        kernel: the extent of its kernel; empty for a linear layer.
        stride, padding, dilation: per dimension of the kernel.

    """

    node: fx.Node
    weight: str
    bias: str | None
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """How many features a channel has."""
        return math.prod(self.kernel)

    @property
    def centre(self) -> int | None:
        """The number of the tap in the middle; None if there is none."""
        if not all(size % 2 for size in self.kernel):
            return None
        return self.taps // 2

    @property
    def channel_dim(self) -> int:
        """The dimension of the call's value that counts outputs."""
        return len(shape_of(self.node)) - len(self.kernel) - 1

    def macs(self, outputs: int, kind: Kind | None = None) -> float:
        """Multiply-accumulates per position for that many outputs; None for the layer as it is."""
        whole = self.channels * self.taps
        match kind:
            case None:
                return float(outputs * whole)
            case Kind("pointwise"):
                return float(outputs * self.channels)
            case Kind("depthwise"):
                return float(whole + outputs * self.channels)
            case Kind("low-rank", rank):
                return float(rank * (whole + outputs))
            case Kind("pair", rank):
                wide = self.stride[1] * self.channels * self.kernel[0]
                return float(rank * (wide + outputs * self.kernel[1]))
        raise AssertionError(kind)

    def kinds(self, outputs: int, share: float) -> list[Kind]:
        """Return candidates for that many outputs.

        Where a 1 x 1 is one, ranks are the largest that cost no more than it; elsewhere the rank
        is a share of the outputs.
        """
        if self.centre is None or self.taps == 1:
            found = [self.kind(name, outputs, share) for name in NAMES]
            return [kind for kind in found if kind is not None]
        ranked: list[Name] = ["low-rank", "pair"] if self._two_dimensional() else ["low-rank"]
        budget = self.macs(outputs, Kind("pointwise"))
        fits = [Kind(name, int(budget / self.macs(outputs, Kind(name, 1)))) for name in ranked]
        return [Kind("pointwise"), Kind("depthwise"), *(kind for kind in fits if kind.rank)]

    def kind(self, name: Name, outputs: int, share: float) -> Kind | None:
        """Return the kind of that name, with a rank that is a share of the outputs.

        None where the layer has no such implant.
        """
        if name in RANKED:
            fits = name == "low-rank" or self._two_dimensional()
            return Kind(name, max(1, round(share * outputs))) if fits else None
        fits = self.taps > 1 and (name == "depthwise" or self.centre is not None)
        return Kind(name) if fits else None

    def _two_dimensional(self) -> bool:
        return len(self.kernel) == 2 and min(self.kernel) > 1


def site_of(program: Program, node: fx.Node) -> Site | str:
    """Describe a call as a site, or say why it cannot be one."""
    known = operator_of(node)
    if known.weight_outputs != 0:
        return f"{node.target} has no implants"
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    for part in (weight, bias):
        if isinstance(part, fx.Node) and part.op != "get_attr":
            return f"{part.name} is computed, not stored"
    if len(program.readers(str(weight.target))) > 1:
        return "its weight is shared with another layer"
    names = str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None
    if known.kind == "linear":
        return Site(node, *names, shape_of(weight)[1], ())
    if given["groups"] != 1:
        return "it is a grouped convolution: its outputs already read few channels"
    kernel = shape_of(weight)[2:]
    if len(kernel) > 2:
        return f"{node.target} has no implants"
    stride, dilation = (spread(given[name], len(kernel)) for name in ("stride", "dilation"))
    around = paddings(given["padding"], kernel, dilation)
    if any(before != after for before, after in around):
        return "its padding is not the same on both sides"
    padding = tuple(before for before, _ in around)
    return Site(node, *names, shape_of(weight)[1], kernel, stride, padding, dilation)


@dataclass(frozen=True, eq=False)
class Stage:
    """One operator of an implant: a weight, and how a convolution with it slides."""

    weight: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Implant:
    """Operators that stand for some outputs of a site, fitted.

    Attributes:
        kind: what they are.
        stages: in order.
        bias: what the last one adds, per output.
        rows: outputs x features: the weight that all stages amount to.
        unexplained: per output, the variance of the error over that of the output.

    """

    kind: Kind
    stages: tuple[Stage, ...]
    bias: Tensor
    rows: Tensor
    unexplained: Tensor
