"""Trying plans out: how far removal and whole-layer implants move the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.context import Context
from fxprune.data import Batch, batches
from fxprune.facts import Plan, Slot
from fxprune.graph.program import Program, shape_of
from fxprune.implants.fits import fit
from fxprune.implants.kinds import Kind, Site
from fxprune.implants.moments import Moments
from fxprune.implants.places import named_sites, output_scale
from fxprune.implants.surgery import finish, put_implant
from fxprune.structure.groups import Group
from fxprune.structure.removal import remove_units
from fxprune.training.evaluate import fixed_batch
from fxprune.training.loop import placed

aten = torch.ops.aten
LEAST = 64  # values per channel that statistics are taken from, else they stay as they are


class Trials:
    """Carries plans out on copies of a program and compares what they compute with it.

    Args:
        program: what is planned for; it stays as it is.
        groups: of the program.
        moments: of what its layers read, by node name.
        context: for its calibration samples.
        samples: how many of them the outputs are compared on.
        batch_size: samples per batch.

    """

    def __init__(
        self, program: Program, groups: Sequence[Group], moments: Mapping[str, Moments],
        context: Context, samples: int, batch_size: int,
    ) -> None:  # fmt: skip
        self._program, self._moments = program, moments
        self._groups = {group.name: group for group in groups}
        self._device = context.device
        found, size = context.samples.calibration, fixed_batch(program) or batch_size
        limit = max(min(samples, len(found)) // size * size, min(size, len(found)))
        stream = batches(found, size, seed=context.seed + 1, limit=limit, device=context.device)
        self._batches = list(stream)
        self._wanted = self._outputs(program.copy().eval())

    def moved(self, plan: Plan) -> float:
        """Return the mean square by which a plan moves the output.

        Batch norms use the statistics of each batch, as if they had been recalibrated. Implants
        are fitted to what the layers read before removal.
        """
        small = self._program.copy().eval()
        chosen = {self._groups[name]: units for name, units in plan.remove.items()}
        remove_units(small, chosen)
        sites, _ = named_sites(small, set(plan.kinds))
        for site in sites:
            self._implant(small, site, Kind.parse(plan.kinds[site.weight]), chosen)
        finish(small)
        pairs = list(zip(self._outputs(small), self._wanted, strict=True))
        total = sum(
            float((made.double() - wanted.double()).square().sum()) for made, wanted in pairs
        )
        return total / max(sum(wanted.numel() for _, wanted in pairs), 1)

    def _implant(
        self, small: Program, site: Site, kind: Kind, chosen: Mapping[Group, Sequence[int]]
    ) -> None:
        moments = self._moments[site.node.name]
        channels = len(moments.total) // site.taps
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
        with placed(program, self._device), torch.no_grad():
            return [leaf for batch in self._batches for leaf in _run(program, batch)]


def _gone(slot: Slot, chosen: Mapping[Group, Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The indices of a slot that units stand for."""
    found = [np.zeros(0, dtype=np.int64)]
    for group, units in chosen.items():
        if slot in group.slots:
            numbers, indices = group.places(slot)
            found.append(indices[np.isin(numbers, units)])
    return np.concatenate(found)


def _run(program: Program, batch: Batch) -> list[Tensor]:
    leaves = pytree.tree_leaves(_Recalibrated(program.graph_module).run(*batch.inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Recalibrated(fx.Interpreter):
    """Runs batch norms on the statistics of the batch, where it has values enough."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not aten.batch_norm.default:
            return super().run_node(n)
        (x, weight, bias, *_), _ = self.fetch_args_kwargs_from_env(n)
        if x.numel() < LEAST * x.shape[1]:
            return super().run_node(n)
        eps: Any = n.args[7]
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
