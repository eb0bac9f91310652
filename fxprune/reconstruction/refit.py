"""Layer-wise least squares: weights re-fitted so that values stay those of the dense program.

For a layer, ``r`` is what its value would have to change by for the value at the end of its affine
tail to equal the dense program's at the positions that remain (see ``region.affine_tail``): the
error there, divided by the slope in between. The weights and the bias change by the least-squares
solution, scaled so that the error on held-out samples is smallest. If a layer before a batch norm
has no bias, the norm's running mean is shifted instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.calibration.layer_matrix import Layer, PositionSample, blocks, weight_rows
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
MIN_POSITIONS, POSITIONS_PER_FEATURE = 131072, 64  # over all samples


@dataclass(frozen=True)
class LayerResult:
    """The result of reconstructing one layer.

    Attributes:
        layer: the name of its weight.
        until: the last value that was compared with the dense program's.
        before: the error on held-out samples. Without lookahead a mean square at the layer's
            output; with lookahead half the sum, over outputs, of mean squares relative to the dense
            values.
        after: the same with the new weights.
        seconds: the time taken.
        cg_steps: the number of conjugate-gradient steps.
        peak_gib: peak memory of the process so far, in GiB; None where it is unknown.

    """

    layer: str
    until: str
    before: float
    after: float
    seconds: float = 0.0
    cg_steps: int = 0
    peak_gib: float | None = None


class Refit:
    """One layer's problem: ``add`` batches to it, then ``apply`` its solution.

    Args:
        program: what the layer is part of.
        region: the layer, and the ends of its calls' affine tails.
        keep: which of the weights may differ from zero; None for all.
        samples: the number of samples that will be added. Of the many positions of large images a
            random part is used: at least ``MIN_POSITIONS`` over all samples, and
            ``POSITIONS_PER_FEATURE`` for each weight of an output.

    """

    def __init__(
        self, program: Program, region: Region, keep: Tensor | None = None, samples: int = 1
    ) -> None:
        self.program, self.region, self.layer = program, region, region.layer
        self._keep = keep
        features = program.tensor(self.layer.weight)[0].numel()
        positions = max(MIN_POSITIONS, POSITIONS_PER_FEATURE * features)
        self._sample = PositionSample(-(-positions // samples), torch.Generator().manual_seed(0))
        self._tails = []  # each up to its last value among the outputs
        for tail in map(affine_tail, self.layer.calls):
            last = max(number for number, node in enumerate(tail) if node in region.outputs)
            self._tails.append(tail[: last + 1])
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
            for x, r in blocks(call, values[argument(call, "input")], error, self._sample):
                if held_out not in self._moments:
                    empty = Moments.zeros(x.shape[0], x.shape[1], r.shape[1], x.device)
                    self._moments[held_out] = empty
                self._moments[held_out].add(x, r)

    def apply(self, ridge: float) -> LayerResult | None:
        """Change the weights and the bias; return None where there is no error to reduce."""
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
        before, after = (self._error(judge, *step) for step in (zero, (change, shift)))
        name, until = self.layer.weight, self.region.outputs[-1].name
        if not after < before:
            return LayerResult(name, until, before, before)
        weight = self.program.tensor(self.layer.weight).detach()
        moved = weight.double() + change.flatten(0, 1).view(weight.shape)
        set_tensor(self.program, self.layer.weight, moved.to(weight.dtype))
        for absorber, sign, where in absorbers:
            value = self.program.tensor(absorber).detach().clone()
            value[where] = (value[where].double() + sign * shift.view(-1)).to(value.dtype)
            set_tensor(self.program, absorber, value)
        return LayerResult(name, until, before, after)

    def error(self, frontier: Values, wanted: list[Tensor]) -> float:
        """Return the sum of squared errors at the outputs for one batch and the current weights."""
        values = self.region.run(self.program, frontier, {})
        pairs = zip(self.region.outputs, wanted, strict=True)
        return sum(float((values[node] - value).double().square().sum()) for node, value in pairs)

    def stored(self) -> dict[str, Tensor]:
        """Return the current values of the tensors that ``apply`` changes."""
        names = [self.layer.weight, *(name for name, *_ in _absorbers(self.program, self.layer))]
        return {name: self.program.tensor(name).detach() for name in names}

    def _error(self, moments: Moments, change: Tensor, shift: Tensor) -> float:
        loss = moments.loss(change, shift).view(-1)
        scale = self._slopes[0]
        if scale is not None:
            loss = torch.where(scale.isinf(), 0.0, loss * scale.square())
        return float(loss.mean()) / moments.count


def _absorbers(program: Program, layer: Layer) -> list[tuple[str, float, slice]]:
    """The tensors that absorb a shift of the layer's value, with its sign and its position."""
    if layer.bias is not None:
        return [(layer.bias, 1.0, slice(None))]
    found = []
    for call in layer.calls:
        tail = affine_tail(call)
        until = 1
        while until < len(tail) and (
            operator_of(tail[until]).identity or packet_of(tail[until]) is aten.cat
        ):
            until += 1
        if until == len(tail) or packet_of(tail[until]) is not aten.batch_norm:
            return []
        mean: Any = tail[until].args[3]
        if len(mean.users) > 1:
            return []
        found.append((str(mean.target), -1.0, channels(tail[:until])))
    return found if len({name for name, *_ in found}) == len(found) else []
