"""Whole layers of low rank as alternatives to removal, under one budget.

A layer's outputs mostly vary in fewer directions than there are outputs, so that a layer of low
rank explains more of them per cost than any layer with the same outputs missing. What a rank costs
in sensitivity is, over the units that the layer computes, their scores times the share of their
variance that the rank leaves unexplained, a sum of discarded eigenvalues (``fits``).
A cut then has one number per group, the units that go, and one per layer, its choice of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fxprune.calibration.moments import Moments
from fxprune.graph.facts import Slot
from fxprune.graph.program import Program, shape_of
from fxprune.implants.costs import ChoiceCosts, Widening
from fxprune.implants.implant_types import Kind, Site
from fxprune.implants.sites import output_scale
from fxprune.planning.cost_evaluator import Floats, Ledger
from fxprune.planning.cost_model import CostModel
from fxprune.planning.problem import Problem
from fxprune.planning.widths import Rounding, Widths
from fxprune.structure.groups import Group
from fxprune.structure.merging import Ints


@dataclass(frozen=True, eq=False)
class Spectrum:
    """How a layer's outputs vary.

    Attributes:
        values: variances along orthogonal directions, descending, outputs scaled as later norms do.
        squares: outputs x directions: the square of each direction's component.

    """

    values: Floats
    squares: Floats

    @property
    def variances(self) -> Floats:
        """The variance of each output."""
        found: Floats = self.squares @ self.values
        return found

    def losses(self, weights: Floats) -> Floats:
        """Return, by rank from zero to full, the weighted sum of the variances that are left."""
        parts = self.values * (weights @ self.squares)
        return np.append(np.cumsum(parts[::-1])[::-1], 0.0)


def spectrum(program: Program, site: Site, moments: Moments) -> Spectrum:
    """Decompose what a layer computes."""
    rows = program.tensor(site.weight).detach().double().flatten(1)
    scale = output_scale(program, site)
    rows = rows if scale is None else rows * scale.view(-1, 1)
    values, vectors = torch.linalg.eigh(rows @ moments.covariance[0] @ rows.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return Spectrum(values.cpu().numpy(), vectors.square().cpu().numpy())


@dataclass(frozen=True, eq=False)
class Ranks:
    """The choices of one layer: as it is, then ever smaller ranks.

    Attributes:
        site: the layer.
        ranks: by choice; the first, zero, stands for the layer as it is.
        losses: the sensitivity spent.
        levels: for each rounding, which choices keep it.

    """

    site: Site
    ranks: Ints
    losses: Floats
    levels: tuple[Ints, ...]

    @property
    def dropped(self) -> Ints:
        """By how much each choice is below full rank."""
        return np.where(self.ranks > 0, self.outputs - self.ranks, 0)

    @property
    def outputs(self) -> int:
        """How many outputs the layer has."""
        return shape_of(self.site.node)[self.site.channel_dim]


def ranks_of(
    sites: Sequence[Site], spectra: Mapping[str, Spectrum], groups: Mapping[Group, Floats],
    roundings: Sequence[Rounding],
) -> list[Ranks]:  # fmt: skip
    """Return the choices of every layer that would save something.

    Args:
        sites: the layers.
        spectra: by name of the node.
        groups: the scores of their units.
        roundings: what ranks are rounded to, as widths are.

    """
    shares = _shares(sites, spectra, groups)
    found = []
    for site in sites:
        outputs = len(spectra[site.node.name].values)
        whole = site.macs(outputs) / site.macs(outputs, Kind("low-rank", 1))
        ranks = np.arange(min(outputs, math.ceil(whole) - 1), 0, -1)
        losses = spectra[site.node.name].losses(shares[site])[ranks]
        allowed = [outputs - Widths(outputs).losses(rounding) for rounding in roundings]
        saved = 1 - ranks / whole
        levels = tuple(_worthwhile(np.isin(ranks, few), losses / saved) for few in allowed)
        if len(ranks):
            found.append(Ranks(site, np.append(0, ranks), np.append(0.0, losses), levels))
    return found


def _worthwhile(rounded: NDArray[np.bool_], price: Floats) -> Ints:
    """The choices of one rounding, without those that cost more per saving than a smaller rank.

    The solver goes step by step, and nothing would lead it past a dear first step.
    """
    allowed = np.flatnonzero(rounded)
    best = int(price[allowed].argmin()) if len(allowed) else 0
    return np.concatenate([[0], 1 + allowed[best:]])


def _shares(
    sites: Sequence[Site], spectra: Mapping[str, Spectrum], groups: Mapping[Group, Floats]
) -> dict[Site, Floats]:
    """By layer, the sensitivity of each output per variance that is left of it.

    A unit that several layers compute shares its score out by variance.
    """
    found = {site: np.zeros(len(spectra[site.node.name].values)) for site in sites}
    for group, scores in groups.items():
        mine = [site for site in sites if Slot(site.weight, 0) in group.slots]
        total = np.zeros(len(scores))
        for site in mine:
            units, indices = group.places(Slot(site.weight, 0))
            np.add.at(total, units, spectra[site.node.name].variances[indices])
        for site in mine:
            units, indices = group.places(Slot(site.weight, 0))
            found[site][indices] = (scores / np.maximum(total, 1e-300))[units]
    return found


def with_layers(
    program: Program, problem: Problem, model: CostModel, layers: Sequence[Ranks]
) -> Problem:
    """Widen a problem of removal by one number per layer."""
    count, many = len(model.groups), len(layers)
    widening = Widening(model, count + 2 * many)
    for number, layer in enumerate(layers):
        site, taps = layer.site, float(layer.site.taps)
        channels = widening.slot(Slot(site.weight, 1), site.channels)
        outputs = widening.slot(Slot(site.weight, 0), layer.outputs)
        thin, rank = widening.count(count + number), widening.count(count + many + number)
        products = [
            (-taps, (thin, channels, outputs)), (taps, (rank, channels)), (1.0, (rank, outputs))
        ]  # fmt: skip
        widening.add(program, site, products, (thin, outputs))
    ledger = Ledger.of(widening.model(), problem.costs.quantities)
    tables = [np.arange(len(loss), dtype=np.float64)[:, None] for loss in problem.losses]
    tables += [np.stack([layer.ranks > 0, layer.ranks], axis=1) * 1.0 for layer in layers]
    columns = [np.array([number]) for number in range(count)]
    columns += [np.array([count + number, count + many + number]) for number in range(many)]
    units = [(np.arange(len(loss)), len(loss)) for loss in problem.losses]
    units += [(layer.dropped, layer.outputs) for layer in layers]
    return replace(
        problem,
        names=(*problem.names, *(layer.site.weight for layer in layers)),
        costs=ChoiceCosts(ledger, tuple(tables), tuple(columns)),
        losses=(*problem.losses, *(layer.losses for layer in layers)),
        units=tuple(units),
        levels=tuple(
            (*level, *(layer.levels[number] for layer in layers))
            for number, level in enumerate(problem.levels)
        ),
    )
