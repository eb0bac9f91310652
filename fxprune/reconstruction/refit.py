"""Layer-wise least squares: weights re-fitted so that values stay those of the dense program.

For a layer, ``r`` is what its value would have to change by for the value at the end of its affine
tail to be the dense program's at the places that are left (see ``region.affine_tail``): the error
there, divided by the slope in between. The weights and the bias change by the least-squares
solution, scaled so that the error on samples held out is smallest; without a bias of its own, a
layer before a batch norm shifts the norm's running mean instead.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.layer_matrix import Layer, Some, blocks, weight_rows
from fxprune.calibration.least_squares import solve
from fxprune.calibration.moments import Moments
from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.reconstruction.incremental_run import Values
from fxprune.reconstruction.region import (
    Region,
    affine_tail,
    along_channels,
    channels,
    own_channels,
    slope,
)

aten = torch.ops.aten
POSITIONS, PER_FEATURE = 131072, 64


@dataclass(frozen=True)
class Fit:
    """What re-fitting a layer came to: mean square errors at its outputs on samples held out."""

    before: float
    after: float


class Refit:
    """One layer's problem: ``add`` batches to it, then ``apply`` its solution.

    Args:
        program: what the layer is part of.
        region: the layer, and the ends of its calls' affine tails.
        keep: which of the weights may differ from zero; None for all.
        samples: how many there will be; of the many positions of large images some are drawn, at
            least ``POSITIONS``, and ``PER_FEATURE`` for each weight of an output.

    """

    def __init__(
        self, program: Program, region: Region, keep: Tensor | None = None, samples: int = 1
    ) -> None:
        self.program, self.region, self.layer = program, region, region.layer
        self._keep = keep
        positions = max(POSITIONS, PER_FEATURE * program.tensor(self.layer.weight)[0].numel())
        self._some = Some(-(-positions // samples), torch.Generator().manual_seed(0))
        self._tails = [_until(affine_tail(call), region.outputs) for call in self.layer.calls]
        self._slopes = [slope(program, tail) for tail in self._tails]
        self._moments: dict[bool, Moments] = {}

    def add(self, frontier: Values, wanted: list[Tensor], held_out: bool) -> None:
        """Count a batch: the values before the region, and the dense ones at its outputs."""
        values = self.region.run(self.program, frontier, {})
        target = dict(zip(self.region.outputs, wanted, strict=True))
        for call, tail, scale in zip(self.layer.calls, self._tails, self._slopes, strict=True):
            error = own_channels(tail, target[tail[-1]] - values[tail[-1]])
            if scale is not None:
                error = error / along_channels(call, scale).to(error.dtype)
            for x, r in blocks(call, values[argument(call, "input")], error, self._some):
                if held_out not in self._moments:
                    empty = Moments.zeros(x.shape[0], x.shape[1], r.shape[1], x.device)
                    self._moments[held_out] = empty
                self._moments[held_out].add(x, r)

    def apply(self, ridge: float) -> Fit | None:
        """Change the weights and the bias; returns None where there is nothing to mend."""
        fitted = self._moments[False]
        judge = self._moments.get(True, fitted)
        if not float(fitted.energy.sum()):
            return None
        absorbers = _absorbers(self.program, self.layer)
        keep = None if self._keep is None else weight_rows(self.layer.node, self._keep)
        change, shift = solve(fitted, ridge, bias=bool(absorbers), keep=keep)
        size = judge.best_step(change, shift)  # groups x outputs
        change, shift = change * size.unsqueeze(2), shift * size
        zero = torch.zeros_like(change), torch.zeros_like(shift)
        before, after = (self._error(judge, *moved) for moved in (zero, (change, shift)))
        if not after < before:
            return Fit(before, before)
        weight = self.program.tensor(self.layer.weight).detach()
        moved = weight.double() + change.flatten(0, 1).view(weight.shape)
        set_tensor(self.program, self.layer.weight, moved.to(weight.dtype))
        for name, sign, where in absorbers:
            value = self.program.tensor(name).detach().clone()
            value[where] = (value[where].double() + sign * shift.view(-1)).to(value.dtype)
            set_tensor(self.program, name, value)
        return Fit(before, after)

    def error(self, frontier: Values, wanted: list[Tensor]) -> float:
        """Return the sum of squared errors at the outputs for one batch, as weights are now."""
        values = self.region.run(self.program, frontier, {})
        pairs = zip(self.region.outputs, wanted, strict=True)
        return sum(float((values[node] - value).double().square().sum()) for node, value in pairs)

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that ``apply`` changes, as they are."""
        names = [self.layer.weight, *(name for name, *_ in _absorbers(self.program, self.layer))]
        return {name: self.program.tensor(name).detach() for name in names}

    def _error(self, moments: Moments, change: Tensor, shift: Tensor) -> float:
        loss = moments.loss(change, shift).view(-1)
        scale = self._slopes[0]
        if scale is not None:
            loss = torch.where(scale.isinf(), 0.0, loss * scale.square())
        return float(loss.mean()) / moments.count


def _until(tail: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The tail as far as its last value that is among the outputs."""
    last = max(number for number, node in enumerate(tail) if node in outputs)
    return tail[: last + 1]


def _passes_channels(node: fx.Node) -> bool:
    """Whether a call leaves channels as they are."""
    return operator_of(node).identity or packet_of(node) is aten.cat


def _absorbers(program: Program, layer: Layer) -> list[tuple[str, float, slice]]:
    """The tensors that take up a shift of the layer's value, with which sign, and where."""
    if layer.bias is not None:
        return [(layer.bias, 1.0, slice(None))]
    found = []
    for call in layer.calls:
        tail = affine_tail(call)
        moved = itertools.takewhile(_passes_channels, tail[1:])
        until = 1 + len(list(moved))
        if until == len(tail) or packet_of(tail[until]) is not aten.batch_norm:
            return []
        mean: Any = tail[until].args[3]
        if len(mean.users) > 1:
            return []
        found.append((str(mean.target), -1.0, channels(tail[:until])))
    return found if len({name for name, *_ in found}) == len(found) else []
