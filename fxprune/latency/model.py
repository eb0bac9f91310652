"""Latency as a function of the units removed from each group, from times measured on this host.

A layer's time is measured on a grid of widths: every eighth channel up to 64, coarser beyond, and
always the full width. Between grid points, times are interpolated linearly in each dimension; the
channels of a convolution are first rounded up to whole steps of kernels (``stairs``). Times must
not fall as a dimension grows: where noise violates this, the smaller layer gets the time of the
larger one. Operators other than layers take time in proportion to the elements that they compute.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.graph.program import Program
from fxprune.latency.table import Table
from fxprune.latency.terms import AXES, Term, configs_of, elements_of
from fxprune.planning.budget import Quantity
from fxprune.planning.cost_evaluator import Floats
from fxprune.structure.merging import Ints


@dataclass(frozen=True)
class Calibration:
    """Conversion from the times of single layers to the latency of a network on this host.

    Attributes:
        per_us: milliseconds of the network per microsecond of the table.
        per_element: milliseconds per element computed outside of layers.
        fixed: milliseconds that removal cannot save.

    """

    per_us: float
    per_element: float
    fixed: float

    def predict(self, program: Program, table: Table) -> float:
        """Return a program's milliseconds; its layers must be in the table."""
        layers = float(table.us(configs_of(program)).sum())
        return self.fixed + self.per_us * layers + self.per_element * elements_of(program)

    def __mul__(self, factor: float) -> Calibration:
        return Calibration(self.per_us * factor, self.per_element * factor, self.fixed * factor)


@dataclass(frozen=True, eq=False)
class LatencyLedger:
    """Milliseconds of candidate cuts, for the solver.

    Attributes:
        lengths: (terms, 3), what is left of the axes when nothing is removed.
        shrink: (terms, 3, groups), by how much one unit of a group shrinks an axis.
        blocks: (terms, 3), to a multiple of what lengths are rounded up.
        knots: (terms, 3, knots), the lengths of the grid, filled up with infinity.
        times: (terms, knots, knots, knots), milliseconds on the grid.
        fixed: milliseconds besides.

    """

    lengths: Floats
    shrink: Floats
    blocks: Ints
    knots: Floats
    times: Floats
    fixed: float

    @classmethod
    def of(
        cls, terms: Sequence[Term], groups: int, table: Table, how: Calibration
    ) -> LatencyLedger:
        """Arrange terms whose shapes are in the table."""
        count = max((len(knots) for term in terms for knots in term.knots), default=1)
        lengths, blocks = np.ones((len(terms), AXES)), np.ones((len(terms), AXES), dtype=np.int64)
        shrink = np.zeros((len(terms), AXES, groups))
        knots = np.full((len(terms), AXES, count), np.inf)
        knots[:, :, 0] = 1
        times = np.zeros((len(terms), count, count, count))
        for number, term in enumerate(terms):
            for place, (axis, own) in enumerate(zip(term.axes, term.knots, strict=True)):
                lengths[number, place], blocks[number, place] = axis.length, axis.block
                shrink[number, place] = axis.shrink
                knots[number, place, : len(own)] = own
            grid = _grid(term, table, how)
            first, second, third = grid.shape
            times[number, :first, :second, :third] = grid
        return cls(lengths, shrink, blocks, knots, times, how.fixed)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the columns of the answers are."""
        return ("latency_ms",)

    def values(self, removed: Ints) -> Floats:
        """Return the costs of several cuts: (cuts, groups) -> (cuts, 1)."""
        left = self.lengths - np.einsum("tag,cg->cta", self.shrink, removed)
        term = np.tile(np.arange(len(self.lengths)), len(removed))
        times = self._interpolated(term, left.reshape(-1, AXES))
        total: Floats = self.fixed + times.reshape(len(removed), -1).sum(axis=1, keepdims=True)
        return total

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        """Return by how much costs change if one group alone is set to another count."""
        starts, terms = self._touched
        lengths = starts[groups + 1] - starts[groups]
        candidate = np.repeat(np.arange(len(groups)), lengths)
        within = np.arange(len(candidate)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        term = terms[starts[groups][candidate] + within]
        left = self.lengths - self.shrink @ removed
        lost = (counts - removed[groups])[candidate]
        after = left[term] - self.shrink[term, :, groups[candidate]] * lost[:, None]
        before = self._interpolated(np.arange(len(left)), left)
        change = self._interpolated(term, after) - before[term]
        totals: Floats = np.bincount(candidate, change, len(groups)).astype(np.float64)[:, None]
        return totals

    @functools.cached_property
    def _touched(self) -> tuple[Ints, Ints]:
        """The terms that each group changes: where its run starts, and the runs."""
        group, term = np.nonzero((self.shrink != 0).any(axis=1).T)
        return np.searchsorted(group, np.arange(self.shrink.shape[2] + 1)), term

    def _interpolated(self, term: Ints, left: Floats) -> Floats:
        """Return milliseconds of terms at the lengths of their axes: (n,), (n, 3) -> (n,)."""
        blocks, knots = self.blocks[term], self.knots[term]
        at = np.minimum(np.ceil(left / blocks - 1e-9) * blocks, self.lengths[term])
        last = np.isfinite(knots).sum(axis=2) - 1
        lower = np.clip((knots <= at[:, :, None]).sum(axis=2) - 1, 0, np.maximum(last - 1, 0))
        upper = np.minimum(lower + 1, last)
        start, end = (np.take_along_axis(knots, i[:, :, None], 2)[:, :, 0] for i in (lower, upper))
        share = np.clip((at - start) / np.where(end > start, end - start, 1), 0, 1)
        total = np.zeros(len(term))
        for corner in itertools.product((False, True), repeat=AXES):
            weight = np.where(corner, share, 1 - share).prod(axis=1)
            place = np.where(corner, upper, lower)
            total += weight * self.times[term, place[:, 0], place[:, 1], place[:, 2]]
        return total


def _grid(term: Term, table: Table, how: Calibration) -> Floats:
    """Return a term's milliseconds at its knots, one dimension per axis, three in all."""
    lengths = [len(knots) for knots in term.knots]
    filled = (*lengths, *(1,) * (AXES - len(lengths)))
    if not term.configs:
        grid = np.zeros(filled)
        grid[-1, -1, -1] = how.per_element * term.elements
        return grid
    times = how.per_us * table.us(term.configs).reshape(filled)
    for axis in range(AXES):
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
    return np.asarray(times)
