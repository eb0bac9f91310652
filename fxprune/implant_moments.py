"""Second moments of what layers read: streamed over calibration samples, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.context import Context
from fxprune.data import batches
from fxprune.evaluate import fixed_batch
from fxprune.implants import Site
from fxprune.program import Program
from fxprune.training import placed

BLOCK = 2**22  # elements of a block of features in double precision


@dataclass
class Moments:
    """Sums over positions of one site.

    Attributes:
        gram: features times features.
        total: of the features.
        count: how many positions.

    """

    gram: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> Moments:
        """Return the moments of nothing."""
        shape, kind = (features, features), torch.float64
        return cls(torch.zeros(shape, dtype=kind, device=device),
                   torch.zeros(features, dtype=kind, device=device))  # fmt: skip

    def add(self, features: Tensor) -> None:
        """Count positions, (positions, features)."""
        for block in features.split(max(1, BLOCK // features.shape[1])):
            values = block.double()
            self.gram.addmm_(values.T, values)
            self.total += values.sum(0)
        self.count += len(features)

    @property
    def mean(self) -> Tensor:
        """The mean of the features."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance of the features."""
        return self.gram / self.count - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Sampling:
    """What moments are taken over.

    Attributes:
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per batch.
        positions: how many positions of each layer at most, spread evenly over the batches.

    """

    samples: int
    batch_size: int
    positions: int


def measure(
    program: Program, sites: Sequence[Site], context: Context, sampling: Sampling
) -> dict[str, Moments]:
    """Run calibration samples and return the moments of what each site reads, by node name."""
    if not sites:
        return {}
    samples, fixed = context.samples.calibration, fixed_batch(program)
    total = min(sampling.samples, len(samples))
    size = fixed or min(sampling.batch_size, total)
    count = max(1, total // size) if fixed else -(-total // size)
    stream = batches(
        samples, size, seed=context.seed, limit=min(total, count * size), device=context.device
    )
    program.eval()
    generator = torch.Generator().manual_seed(context.seed)
    with placed(program, context.device), torch.no_grad():
        recorder = _Recorder(program, sites, max(1, sampling.positions // count), generator)
        for batch in context.progress.track(stream, "measuring what layers read", total=count):
            recorder.run(*batch.inputs)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(
        self, program: Program, sites: Iterable[Site], positions: int, generator: torch.Generator
    ) -> None:
        super().__init__(program.graph_module)
        self.found: dict[str, Moments] = {}
        self._sites = {site.node: site for site in sites}
        self._positions, self._generator = positions, generator

    def run_node(self, n: fx.Node) -> Any:
        if n in self._sites:
            (value, *_), _ = self.fetch_args_kwargs_from_env(n)
            self._record(self._sites[n], value)
        return super().run_node(n)

    def _record(self, site: Site, value: Tensor) -> None:
        found = features(site, value)
        if len(found) > self._positions:
            order = torch.randperm(len(found), generator=self._generator)
            found = found[order[: self._positions].to(found.device)]
        name = site.node.name
        if name not in self.found:
            self.found[name] = Moments.zeros(found.shape[1], found.device)
        self.found[name].add(found)


def features(site: Site, value: Tensor) -> Tensor:
    """Spread what a site reads into (positions, channels times taps)."""
    if not site.kernel:
        return value.flatten(0, -2)
    one = len(site.kernel) == 1
    if value.dim() == len(site.kernel) + 1:
        value = value.unsqueeze(0)
    sizes = (site.kernel, site.dilation, site.padding, site.stride)
    if one:
        value = value.unsqueeze(2)
        sizes = tuple((1, *item) for item in (site.kernel, site.dilation))  # type: ignore[assignment]
        sizes = (*sizes, (0, *site.padding), (1, *site.stride))  # type: ignore[assignment]
    return F.unfold(value, *sizes).transpose(1, 2).flatten(0, 1)
