"""Prospects: how much of each unit's output every kind of implant would leave unexplained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.calibration.moments import Moments
from fxprune.graph.facts import Slot
from fxprune.graph.program import Program
from fxprune.implants.fits import fit
from fxprune.implants.implant_types import Kind, Name, Site
from fxprune.implants.moments import Sampling, measure
from fxprune.implants.sites import output_scale, rows_of, sites_of
from fxprune.pipeline.context import Context
from fxprune.planning.cost_evaluator import Floats
from fxprune.structure.groups import Group

RANKS = (0.125, 0.25, 0.375, 0.5)  # of low-rank implants, as shares of the outputs


@dataclass(frozen=True)
class Recipe:
    """A kind of implant whose rank, if it has one, is a share of the outputs that it makes."""

    name: Name
    share: float = 0.0

    def kind(self, outputs: int) -> Kind:
        """Return the kind for that many outputs."""
        return Kind(self.name, max(1, round(self.share * outputs)) if self.share else 0)


@dataclass(frozen=True, eq=False)
class Prospect:
    """What implants of a group's units would be.

    Attributes:
        sites: the layers that compute the units.
        outputs: how many outputs of each layer a unit stands for.
        unexplained: by kind, the share of the variance that it leaves, per unit.

    """

    sites: tuple[Site, ...]
    outputs: int
    unexplained: Mapping[Recipe, Floats]


def prospects(
    program: Program, groups: Sequence[Group], context: Context, sampling: Sampling
) -> dict[str, Prospect]:
    """Fit every kind to every layer of groups and tell what is left, by group name.

    Groups that have no layer that can have an implant, or share one with another group, or use a
    layer's outputs unequally, are absent.
    """
    whole = {group: range(len(group.units)) for group in groups}
    sites, _ = sites_of(program, whole)
    own = {group: _own(group, sites) for group in groups}
    wanted = [site for mine in own.values() for site in mine]
    moments = measure(program, wanted, context, sampling)
    found = {}
    for group, mine in own.items():
        kinds = _recipes(mine)
        if kinds:
            left = {kind: _unexplained(program, group, mine, moments, kind) for kind in kinds}
            found[group.name] = Prospect(tuple(mine), group.multiplicity(_slot(mine[0])), left)
    return found


def _slot(site: Site) -> Slot:
    return Slot(site.weight, 0)


def _own(group: Group, sites: Sequence[Site]) -> list[Site]:
    """The layers that compute units of a group, if each computes all of these and nothing else."""
    everything = range(len(group.units))
    mine = [site for site in sites if _slot(site) in group.slots]
    rows = rows_of(mine, {group: everything})
    whole = all(len(rows[site]) == site.node.meta["val"].shape[site.channel_dim] for site in mine)
    counts = {group.multiplicity(_slot(site)) for site in mine}
    return mine if whole and len(counts) == 1 else []


def _recipes(sites: Sequence[Site]) -> list[Recipe]:
    """The kinds that every one of the layers can have."""
    if all(site.taps > 1 for site in sites):
        pointwise = all(site.centre is not None for site in sites)
        found = [Recipe("depthwise"), *([Recipe("pointwise")] if pointwise else [])]
        return found if sites else []
    return [Recipe("low-rank", share) for share in RANKS]


def _unexplained(
    program: Program, group: Group, sites: Sequence[Site], moments: Mapping[str, Moments],
    recipe: Recipe,
) -> Floats:  # fmt: skip
    """Per unit, the variance that is left over the variance, as later norms scale them."""
    left, total = np.zeros(len(group.units)), np.zeros(len(group.units))
    for site in sites:
        weight, found = program.tensor(site.weight).detach(), moments[site.node.name]
        scale = output_scale(program, site)
        implant = fit(site, weight, None, found, recipe.kind(len(weight)), scale=scale)
        rows = weight.double().flatten(1)
        gain = torch.ones(len(rows)) if scale is None else scale
        variance = ((rows @ found.covariance[0]) * rows).sum(1) * gain.square()
        units, indices = group.places(_slot(site))
        np.add.at(total, units, variance.cpu().numpy()[indices])
        np.add.at(left, units, (variance * implant.unexplained).cpu().numpy()[indices])
    share: Floats = left / np.maximum(total, 1e-300)
    return share
