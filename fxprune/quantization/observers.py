"""Observers: what values a place sees, the range that its codes should span, and their scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["minmax", "moving-average", "percentile", "mse", "histogram"]
BINS = 2048
MOMENTUM = 0.9  # of the moving average of batch extremes
PERCENTILE = 0.9999  # of the values other than zero, on each side
VALUES = 2**17  # of a batch that a histogram counts, evenly spread
CLIPS = 64  # ranges that a search tries for each end
WEIGHT_CLIPS = 40
HAIR = 1 - 2.0**-22  # keeps the highest code's number at or below a clamp's ceiling in float32

# Costs of spanning bins by codes: counts, centres, low ends, high ends, levels -> one per range.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass
class Observer:
    """Gathers extremes in one walk over the data, and a histogram between them in a second.

    Attributes:
        low: the smallest value seen.
        high: the largest value seen.
        average: the moving averages of the smallest and largest value of a batch.
        counts: the histogram, of ``BINS`` equal bins from ``low`` to ``high``, zeros left out,
            since every range has a code for them; None before the second walk.

    """

    low: float = float("inf")
    high: float = float("-inf")
    average: tuple[float, float] | None = None
    counts: Tensor | None = None

    def extremes(self, x: Tensor) -> None:
        """Take a batch of the first walk."""
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        old_low, old_high = self.average or (low, high)
        self.average = (
            MOMENTUM * old_low + (1 - MOMENTUM) * low,
            MOMENTUM * old_high + (1 - MOMENTUM) * high,
        )

    def tally(self, x: Tensor) -> None:
        """Take a batch of the second walk."""
        if not self.low < self.high:
            return
        chosen = x.flatten()[:: -(-x.numel() // VALUES) | 1]  # odd, to fall on all columns
        found = torch.histc(chosen[chosen != 0].float(), BINS, self.low, self.high).double()
        self.counts = found if self.counts is None else self.counts + found

    def span(self, method: Method, levels: int) -> tuple[float, float]:
        """Return the range that so many codes should span."""
        if method == "moving-average" and self.average is not None:
            return self.average
        if self.counts is None or method == "minmax" or not self.counts.any():
            return self.low, self.high
        match method:
            case "percentile":
                return self._percentile(self.counts)
            case "mse":
                return self._search(self.counts, squared_error, levels)
        return self._search(self.counts, divergence, levels)

    def _percentile(self, counts: Tensor) -> tuple[float, float]:
        share = counts.cumsum(0) / counts.sum()
        width = (self.high - self.low) / BINS
        first = int((share < 1 - PERCENTILE).sum())
        last = int((share < PERCENTILE).sum())
        return self.low + width * first, self.low + width * (last + 1)

    def _search(self, counts: Tensor, score: Score, levels: int) -> tuple[float, float]:
        """Draw in one end after the other, each to where the score is least; then more finely."""
        width = (self.high - self.low) / BINS
        centres = self.low + width * (torch.arange(BINS, device=counts.device).double() + 0.5)
        extremes = torch.tensor([self.low, self.high]).double().to(counts.device)
        coarse = torch.linspace(1 / CLIPS, 1, CLIPS, device=counts.device).double()
        fine = torch.linspace(-1 / CLIPS, 1 / CLIPS, CLIPS + 1, device=counts.device).double()
        shares = torch.ones_like(extremes)
        for near in (False, True):
            for end in (1, 0, 1):
                tried = shares.repeat(len(fine if near else coarse), 1)
                tried[:, end] = (tried[:, end] + fine).clamp(0, 1) if near else coarse
                low, high = (tried * extremes).unbind(1)
                low, high = low.clamp_max(0), high.clamp_min(0)
                cost = score(counts, centres, low, high, levels)
                shares = tried[int(torch.where(high > low, cost, torch.inf).argmin())]
        low, high = (shares * extremes).tolist()
        return min(low, 0.0), max(high, 0.0)


def squared_error(
    counts: Tensor, centres: Tensor, low: Tensor, high: Tensor, levels: int
) -> Tensor:
    """Sum of squared rounding and clipping errors of every range, spanned by so many codes."""
    step, zero = _grid(low, high, levels)
    codes = torch.clamp(torch.round(centres / step + zero), 0, levels - 1)
    errors: Tensor = (codes - zero) * step - centres
    return (counts * errors.square()).sum(1)


def _grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Steps and zero points of ranges, one row each.

    Zero has a code, so the other codes are not where the ends of a range would put them: pixels
    from -1 to 1 in steps of 2 / 255 would all be half way between two codes.
    """
    step = ((high - low) / (levels - 1)).clamp_min(1e-30)[:, None]
    return step, torch.round(-low[:, None] / step).clamp(0, levels - 1)


def divergence(counts: Tensor, centres: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence of the distribution from what codes can tell of it.

    What is clipped counts at the ends, and a code's mass is spread evenly over its occupied bins
    (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    step, zero = _grid(low, high, levels)
    place = centres / step + zero
    codes = torch.clamp(torch.round(place), 0, levels - 1).long()
    inside = ((place >= -0.5) & (place <= levels - 0.5)).double() * counts
    occupied = (inside > 0).double()
    empty = torch.zeros(len(low), levels, dtype=counts.dtype, device=counts.device)
    mass = empty.scatter_add(1, codes, inside)
    bins = empty.scatter_add(1, codes, occupied).clamp_min(1)
    told = (mass / bins).gather(1, codes) * occupied
    last = empty.scatter_add(1, codes, counts.expand_as(told))
    # The mass of clipped bins joins the occupied bins of the outermost codes, or stays alone there.
    true = inside + ((last - mass) / bins).gather(1, codes) * occupied
    p = torch.cat([true, torch.where(mass > 0, 0, last)], 1)
    q = torch.cat([told, torch.zeros_like(last)], 1)
    p, q = (x / x.sum(1, keepdim=True).clamp_min(1e-30) for x in (p, q))
    return torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0).sum(1)


def activation_scale(low: float, high: float, codes: tuple[int, int]) -> tuple[float, int]:
    """Return scale and zero point of codes that span a range, and zero.

    >>> activation_scale(0.0, 0.0, (0, 255))
    (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        return 1.0, codes[0]
    scale = (high - low) / (codes[1] - codes[0])
    if low == 0:
        return scale * HAIR, codes[0]
    return scale, min(max(round(codes[0] - low / scale), codes[0]), codes[1])


def weight_scale(
    weight: Tensor, high: int, axis: int, *, search: bool = False, paired: bool = False
) -> Tensor:
    """Return the scale of every index along an axis, for codes from ``-high`` to ``high``.

    Args:
        weight: the weight; its output channels are along ``axis``, its inputs along the next.
        high: the highest code.
        axis: the dimension of output channels.
        search: take the scale of least squared error, not that of the largest weight.
        paired: let neighbours of one sign share ``high``, to within rounding.

    """
    weight_rows = weight.detach().movedim(axis, 0).double()
    rows = weight_rows.flatten(1)
    largest = rows.abs().amax(1)
    if paired:  # kernels walk the inputs of one place after another, or all places of one input
        largest = torch.maximum(largest, _neighbours(rows))
        largest = torch.maximum(largest, _neighbours(weight_rows.movedim(1, -1).flatten(1)))
    best = torch.where(largest > 0, largest / high, torch.ones_like(largest))
    if not search or paired:
        return best.to(weight.dtype)
    whole, least = best, torch.full_like(best, torch.inf)
    for share in torch.linspace(0.5, 1, WEIGHT_CLIPS).tolist():
        step = (share * whole)[:, None]
        error = (torch.clamp(torch.round(rows / step), -high, high) * step - rows).square().sum(1)
        best, least = torch.where(error < least, share * whole, best), torch.minimum(error, least)
    return best.to(weight.dtype)


def _neighbours(rows: Tensor) -> Tensor:
    """The largest sum of two neighbours of one sign, per row."""
    if rows.shape[1] < 2:
        return rows.abs().amax(1)
    sums = [side[:, :-1] + side[:, 1:] for side in (rows.clamp_min(0), (-rows).clamp_min(0))]
    return torch.maximum(*sums).amax(1)
