"""Trying a plan out: how far removal and whole-layer implants move the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.context import Context
from fxprune.data import batches
from fxprune.evaluate import fixed_batch
from fxprune.facts import Plan
from fxprune.groups import Group
from fxprune.implant_fits import fit
from fxprune.implant_moments import Sampling, measure
from fxprune.implant_places import named_sites, output_scale
from fxprune.implant_surgery import finish, put_implant
from fxprune.implants import Kind
from fxprune.program import Program, shape_of
from fxprune.removal import remove_units
from fxprune.training import placed


def trial(
    program: Program, plan: Plan, context: Context, groups: Sequence[Group], sampling: Sampling
) -> float:
    """Carry a plan out on a copy and return the mean square by which it moves the output.

    Args:
        program: what is planned for; it stays as it is.
        plan: removals, and kinds for whole layers.
        context: for its calibration samples.
        groups: of the program.
        sampling: how many samples, for the fits and for the comparison.

    """
    small = program.copy().eval()
    by_name = {group.name: group for group in groups}
    remove_units(small, {by_name[name]: units for name, units in plan.remove.items()})
    sites, _ = named_sites(small, set(plan.kinds))
    moments = measure(small, sites, context, sampling)
    for site in sites:
        outputs, kind = shape_of(site.node)[site.channel_dim], Kind.parse(plan.kinds[site.weight])
        weight = small.tensor(site.weight)
        bias = small.tensor(site.bias) if site.bias is not None else None
        scale, kind = output_scale(small, site), replace(kind, rank=min(kind.rank, outputs))
        fitted = fit(site, weight, bias, moments[site.node.name], kind, scale=scale)
        put_implant(small, site, list(range(outputs)), fitted)
    finish(small)
    return _moved(program, small, context, sampling)


def _moved(program: Program, small: Program, context: Context, sampling: Sampling) -> float:
    size = fixed_batch(program) or sampling.batch_size
    samples = context.samples.calibration
    limit = max(min(sampling.samples, len(samples)) // size * size, min(size, len(samples)))
    stream = batches(samples, size, seed=context.seed + 1, limit=limit, device=context.device)
    total, count = 0.0, 0
    dense = program.copy().eval()
    with placed(dense, context.device), placed(small, context.device), torch.no_grad():
        for batch in stream:
            pairs = zip(_tensors(small, batch.inputs), _tensors(dense, batch.inputs), strict=True)
            for made, wanted in pairs:
                total += float((made.double() - wanted.double()).square().sum())
                count += wanted.numel()
    return total / max(count, 1)


def _tensors(program: Program, inputs: tuple[object, ...]) -> list[Tensor]:
    leaves = pytree.tree_leaves(program(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
