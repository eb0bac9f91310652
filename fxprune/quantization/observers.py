"""Observers: the distribution of a value, the range that INT8 should cover, and its scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["minmax", "moving-average", "percentile", "mse", "histogram"]
HISTOGRAM_BINS = 2048
MOMENTUM = 0.9  # of the moving average of batch extremes
PERCENTILE = 0.9999  # of the values other than zero, on each side
HISTOGRAM_VALUES = 2**17  # per batch, evenly spread over it
SEARCH_STEPS = 64  # ranges that a search tries for each end
WEIGHT_SEARCH_STEPS = 40
BELOW_ONE = 1 - 2.0**-22  # keeps the largest quantised value at or below a clamp's limit in float32

# The cost of covering a histogram: counts, centres, low ends, high ends, levels -> one per range.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass
class Observer:
    """Collects extremes in one pass over the data, and a histogram between them in a second.

    Attributes:
        low: the smallest value seen.
        high: the largest value seen.
        average: the moving averages of the smallest and largest value of a batch.
        counts: the histogram of values other than zero, which every range represents exactly, in
            ``HISTOGRAM_BINS`` equal bins from ``low`` to ``high``; None before the second pass.

    """

    low: float = float("inf")
    high: float = float("-inf")
    average: tuple[float, float] | None = None
    counts: Tensor | None = None

    def extremes(self, x: Tensor) -> None:
        """Add a batch of the first pass."""
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        old_low, old_high = self.average or (low, high)
        self.average = (
            MOMENTUM * old_low + (1 - MOMENTUM) * low,
            MOMENTUM * old_high + (1 - MOMENTUM) * high,
        )

    def add_to_histogram(self, x: Tensor) -> None:
        """Add a batch of the second pass."""
        if not self.low < self.high:
            return
        chosen = x.flatten()[
            :: -(-x.numel() // HISTOGRAM_VALUES) | 1
        ]  # odd, to fall on all columns
        found = torch.histc(
            chosen[chosen != 0].float(), HISTOGRAM_BINS, self.low, self.high
        ).double()
        self.counts = found if self.counts is None else self.counts + found

    def span(self, method: Method, levels: int) -> tuple[float, float]:
        """Return the range that so many integers should cover."""
        if method == "moving-average" and self.average is not None:
            return self.average
        if self.counts is None or method == "minmax" or not self.counts.any():
            return self.low, self.high
        match method:
            case "percentile":
                share = self.counts.cumsum(0) / self.counts.sum()
                width = (self.high - self.low) / HISTOGRAM_BINS
                first = int((share < 1 - PERCENTILE).sum())
                last = int((share < PERCENTILE).sum())
                return self.low + width * first, self.low + width * (last + 1)
            case "mse":
                return self._search(self.counts, squared_error, levels)
        return self._search(self.counts, divergence, levels)

    def _search(self, counts: Tensor, score: Score, levels: int) -> tuple[float, float]:
        """Move one end after the other to the least score, on a coarse grid and then a fine one."""
        width = (self.high - self.low) / HISTOGRAM_BINS
        centres = self.low + width * (
            torch.arange(HISTOGRAM_BINS, device=counts.device).double() + 0.5
        )
        extremes = torch.tensor([self.low, self.high]).double().to(counts.device)
        coarse = torch.linspace(1 / SEARCH_STEPS, 1, SEARCH_STEPS, device=counts.device).double()
        fine = torch.linspace(
            -1 / SEARCH_STEPS, 1 / SEARCH_STEPS, SEARCH_STEPS + 1, device=counts.device
        ).double()
        shares = torch.ones_like(extremes)
        for finely in (False, True):
            for end in (1, 0, 1):
                tried = shares.repeat(len(fine if finely else coarse), 1)
                tried[:, end] = (tried[:, end] + fine).clamp(0, 1) if finely else coarse
                low, high = (tried * extremes).unbind(1)
                low, high = low.clamp_max(0), high.clamp_min(0)
                cost = score(counts, centres, low, high, levels)
                shares = tried[int(torch.where(high > low, cost, torch.inf).argmin())]
        low, high = (shares * extremes).tolist()
        return min(low, 0.0), max(high, 0.0)


def squared_error(
    counts: Tensor, centres: Tensor, low: Tensor, high: Tensor, levels: int
) -> Tensor:
    """Return the sum of squared rounding and clipping errors of every range, at so many levels."""
    step, zero = _grid(low, high, levels)
    integers = torch.clamp(torch.round(centres / step + zero), 0, levels - 1)
    errors: Tensor = (integers - zero) * step - centres
    return (counts * errors.square()).sum(1)


def _grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Steps and zero points of ranges, one row each.

    The zero point is an integer, so the ends of a range move: for pixels from -1 to 1 in steps of
    2 / 255, every pixel would otherwise lie half way between two levels.
    """
    step = ((high - low) / (levels - 1)).clamp_min(1e-30)[:, None]
    return step, torch.round(-low[:, None] / step).clamp(0, levels - 1)


def divergence(counts: Tensor, centres: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Return the Kullback-Leibler divergence between the distributions before and after rounding.

    Clipped values count at the ends, and the mass of a level is spread evenly over its occupied
    bins (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    step, zero = _grid(low, high, levels)
    place = centres / step + zero
    integers = torch.clamp(torch.round(place), 0, levels - 1).long()
    inside = ((place >= -0.5) & (place <= levels - 0.5)).double() * counts
    occupied = (inside > 0).double()
    empty = torch.zeros(len(low), levels, dtype=counts.dtype, device=counts.device)
    mass = empty.scatter_add(1, integers, inside)
    bins = empty.scatter_add(1, integers, occupied).clamp_min(1)
    rounded = (mass / bins).gather(1, integers) * occupied
    last = empty.scatter_add(1, integers, counts.expand_as(rounded))
    # The mass of clipped bins joins the occupied bins of the outermost levels, if there are any.
    true = inside + ((last - mass) / bins).gather(1, integers) * occupied
    p = torch.cat([true, torch.where(mass > 0, 0, last)], 1)
    q = torch.cat([rounded, torch.zeros_like(last)], 1)
    p, q = (x / x.sum(1, keepdim=True).clamp_min(1e-30) for x in (p, q))
    return torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0).sum(1)


def activation_scale(low: float, high: float, integers: tuple[int, int]) -> tuple[float, int]:
    """Return scale and zero point for integers that cover a range and zero.

    >>> activation_scale(0.0, 0.0, (0, 255))
    (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        return 1.0, integers[0]
    scale = (high - low) / (integers[1] - integers[0])
    if low == 0:
        return scale * BELOW_ONE, integers[0]
    return scale, min(max(round(integers[0] - low / scale), integers[0]), integers[1])


def weight_scale(
    weight: Tensor, high: int, axis: int, *, search: bool = False, paired: bool = False
) -> Tensor:
    """Return the scale of every index along an axis, for integers from ``-high`` to ``high``.

    Args:
        weight: the weight; its output channels are along ``axis``, its inputs along the next.
        high: the largest integer.
        axis: the dimension of output channels.
        search: use the scale with the least squared error, not that of the largest weight.
        paired: limit sums of two neighbours of the same sign to ``high``, to within rounding.

    """
    weight_rows = weight.detach().movedim(axis, 0).double()
    rows = weight_rows.flatten(1)
    largest = rows.abs().amax(1)
    if paired:  # kernels iterate over the inputs of one position, or over all positions of an input
        largest = torch.maximum(largest, _neighbours(rows))
        largest = torch.maximum(largest, _neighbours(weight_rows.movedim(1, -1).flatten(1)))
    best = torch.where(largest > 0, largest / high, torch.ones_like(largest))
    if not search or paired:
        return best.to(weight.dtype)
    whole, least = best, torch.full_like(best, torch.inf)
    for share in torch.linspace(0.5, 1, WEIGHT_SEARCH_STEPS).tolist():
        step = (share * whole)[:, None]
        error = (torch.clamp(torch.round(rows / step), -high, high) * step - rows).square().sum(1)
        best, least = torch.where(error < least, share * whole, best), torch.minimum(error, least)
    return best.to(weight.dtype)


def _neighbours(rows: Tensor) -> Tensor:
    """The largest sum of two neighbours of the same sign, per row."""
    if rows.shape[1] < 2:
        return rows.abs().amax(1)
    sums = [side[:, :-1] + side[:, 1:] for side in (rows.clamp_min(0), (-rows).clamp_min(0))]
    return torch.maximum(*sums).amax(1)
