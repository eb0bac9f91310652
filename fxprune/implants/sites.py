"""Where implants go: the layers that compute the planned units, and the order of these units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.graph.facts import Slot
from fxprune.graph.node_args import arguments
from fxprune.graph.program import Program
from fxprune.implants.implant_types import Site, site_of
from fxprune.pipeline.contract import Skip
from fxprune.structure.groups import Group
from fxprune.structure.permutation import permute_units

aten = torch.ops.aten
LAYERS = ("aten::conv", "aten::linear")
SAME = 1e-3  # how far reordering may move the output, relative to its largest value

Chosen = Mapping[Group, Sequence[int]]  # by group, the numbers of units


def sites_of(program: Program, groups: Chosen) -> tuple[list[Site], list[Skip]]:
    """Return the layers that compute units of groups, and those that cannot have an implant."""
    made = {slot.tensor for group in groups for slot in group.slots if slot.dim == 0}
    return named_sites(program, made)


def named_sites(program: Program, weights: Collection[str]) -> tuple[list[Site], list[Skip]]:
    """Return the layers with weights of these names, and those that cannot have an implant."""
    sites, skips = [], []
    for node in program.graph.nodes:
        if not str(getattr(node.target, "name", str)()).startswith(LAYERS):
            continue
        weight = arguments(node)["weight"]
        if not isinstance(weight, fx.Node) or str(weight.target) not in weights:
            continue
        site = site_of(program, node)
        if isinstance(site, str):
            skips.append(Skip(node.name, site))
        else:
            sites.append(site)
    return sites, skips


def units_last(program: Program, chosen: Chosen) -> tuple[Chosen, list[Skip]]:
    """Reorder groups so that the chosen units are the last of each, in every tensor.

    A group whose order matters stays as it is.

    Returns:
        By group, the numbers that the chosen units have now, and the groups left as they are.

    """
    orders = {
        group: [*np.setdiff1d(np.arange(len(group.units)), units).tolist(), *units]
        for group, units in chosen.items()
    }
    moved = {group: order for group, order in orders.items() if order != sorted(order)}
    if moved and not _reorder(program, moved):
        moved = {
            group: order for group, order in moved.items() if _reorder(program, {group: order})
        }
    now = {
        group: range(len(group.units) - len(units), len(group.units)) if group in moved else units
        for group, units in chosen.items()
    }
    stuck = [group for group, order in orders.items() if order != sorted(order)]
    skips = [
        Skip(group.name, "the order of its units matters, so they cannot be made contiguous")
        for group in stuck
        if group not in moved
    ]
    return now, skips


def _reorder(program: Program, orders: Mapping[Group, list[int]]) -> bool:
    """Permute units, or leave them as they are where that would change the output."""
    expected = _output(program)
    try:
        permute_units(program, orders)
    except InputError:
        return False
    pairs = zip(_output(program), expected, strict=True)
    if all(float((a - b).abs().max()) <= SAME * float(b.abs().max()) for a, b in pairs):
        return True
    permute_units(program, {group: np.argsort(order).tolist() for group, order in orders.items()})
    return False


def _output(program: Program) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(program.eval()(*program.example_inputs))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]


def rows_of(sites: Sequence[Site], chosen: Chosen) -> dict[Site, list[int]]:
    """Return, by layer, the outputs that units stand for, ascending; layers without are absent."""
    found: dict[Site, list[int]] = {}
    for site in sites:
        slot = Slot(site.weight, 0)
        for group, units in chosen.items():
            if slot in group.slots:
                numbers, indices = group.places(slot)
                found.setdefault(site, []).extend(indices[np.isin(numbers, units)].tolist())
    return {site: sorted(rows) for site, rows in found.items()}


def output_scale(program: Program, site: Site) -> Tensor | None:
    """Return by how much a batch norm that follows scales each output; None where there is none."""
    norms = [user for user in site.node.users if user.target is aten.batch_norm.default]
    if len(norms) != 1 or not isinstance(norms[0].args[4], fx.Node):
        return None
    weight, variance, eps = norms[0].args[1], norms[0].args[4], norms[0].args[7]
    assert isinstance(eps, float)
    scale = (program.tensor(str(variance.target)).detach().double() + eps).rsqrt()
    if isinstance(weight, fx.Node):
        scale = scale * program.tensor(str(weight.target)).detach()
    return scale.abs().clamp_min(1e-6)
