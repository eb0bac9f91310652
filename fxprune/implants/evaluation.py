"""Trying plans out: how far removal and whole-layer implants move the output, once mended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset

from fxprune.calibration.moments import Moments
from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import Batch, batches
from fxprune.data.datasets import Samples
from fxprune.data.roles import Data
from fxprune.graph.facts import REMOVED, Plan, Slot
from fxprune.graph.program import Program, shape_of
from fxprune.implants.fits import fit
from fxprune.implants.implant_types import Kind, Site
from fxprune.implants.sites import named_sites, output_scale
from fxprune.implants.surgery import finish, put_implant
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker
from fxprune.structure.groups import Group
from fxprune.structure.removal import remove_units


class Trials:
    """Carries plans out on copies of a program, mends them, and compares their outputs with its.

    Args:
        program: what is planned for; it stays as it is.
        groups: of the program.
        moments: of what its layers read, by node name.
        context: for its calibration samples, some of which judge, and its recovery passes, which
            restore the accuracy of a copy on the other samples before it is judged.
        samples: how many judge, at most a third of all.
        batch_size: samples per batch of these.

    """

    def __init__(
        self, program: Program, groups: Sequence[Group], moments: Mapping[str, Moments],
        context: Context, samples: int, batch_size: int,
    ) -> None:  # fmt: skip
        self._program, self._moments = program.copy().eval(), moments
        self._groups = {group.name: group for group in groups}
        judges, menders = _parted(context, samples, fixed_batch(program))
        dense = context.dense
        if dense is None:  # what may be gone already is no loss then
            dense = self._program.copy()
            self._program.facts.pop(REMOVED.name, None)
        self._context = replace(
            context, data=Data(menders), dense=dense, progress=Tracker(shown=False)
        )
        size = fixed_batch(program) or batch_size
        self._batches = list(batches(judges, size, device=context.device))
        self._wanted = self._outputs(dense.copy().eval())

    def moved(self, plan: Plan) -> float:
        """Return the mean square by which a plan moves the output of the dense program.

        Implants are fitted to what the layers read before removal.
        """
        small = self._program.copy()
        chosen = {self._groups[name]: units for name, units in plan.remove.items()}
        remove_units(small, chosen)
        sites, _ = named_sites(small, set(plan.kinds))
        for site in sites:
            self._implant(small, site, Kind.parse(plan.kinds[site.weight]), chosen)
        finish(small)
        for step in self._context.recovery:
            step(small, self._context)
        pairs = list(zip(self._outputs(small), self._wanted, strict=True))
        total = sum(
            float((made.double() - wanted.double()).square().sum()) for made, wanted in pairs
        )
        return total / max(sum(wanted.numel() for _, wanted in pairs), 1)

    def _implant(
        self, small: Program, site: Site, kind: Kind, chosen: Mapping[Group, Sequence[int]]
    ) -> None:
        moments = self._moments[site.node.name]
        channels = moments.features.shape[1] // site.taps
        gone = _gone(Slot(site.weight, 1), chosen)
        left = torch.from_numpy(np.setdiff1d(np.arange(channels), gone))
        features = (left.unsqueeze(1) * site.taps + torch.arange(site.taps)).flatten()
        outputs = shape_of(site.node)[site.channel_dim]
        weight = small.tensor(site.weight)
        bias = None if site.bias is None else small.tensor(site.bias)
        implant = fit(
            site, weight, bias, moments.of(features), replace(kind, rank=min(kind.rank, outputs)),
            scale=output_scale(small, site),
        )  # fmt: skip
        put_implant(small, site, list(range(outputs)), implant)

    def _outputs(self, program: Program) -> list[Tensor]:
        with placed(program, self._context.device), torch.no_grad():
            return [leaf for batch in self._batches for leaf in _floats(program, batch)]


def _parted(context: Context, samples: int, fixed: int | None) -> tuple[Samples, Samples]:
    """Divide the calibration samples, drawn at random, into some that judge and the others."""
    found = context.samples.calibration
    least = fixed or 1
    if len(found) < 2 * least:
        return found, found
    size = max(min(samples, len(found) // 3) // least * least, least)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(context.seed))
    judges, menders = order.split([size, len(found) - size])
    return Subset(found, judges.tolist()), Subset(found, menders.tolist())  # type: ignore[arg-type]


def _gone(slot: Slot, chosen: Mapping[Group, Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The indices of a slot that units stand for."""
    found = [np.zeros(0, dtype=np.int64)]
    for group, units in chosen.items():
        if slot in group.slots:
            numbers, indices = group.places(slot)
            found.append(indices[np.isin(numbers, units)])
    return np.concatenate(found)


def _floats(program: Program, batch: Batch) -> list[Tensor]:
    leaves = pytree.tree_leaves(program(*batch.inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
