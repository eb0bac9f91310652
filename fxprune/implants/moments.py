"""Second moments of what layers read: streamed over calibration samples, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.graph.program import Program
from fxprune.implants.implant_types import Site
from fxprune.pipeline.context import Context

BLOCK = 2**22  # elements of a block of features in double precision
PER_FEATURE = 8  # positions that a covariance needs at least, for each of its features
PRODUCTS = 2**33  # multiply-accumulates that a covariance may take beyond that


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

    def of(self, features: Tensor) -> Moments:
        """Return the moments of some of the features."""
        chosen = features.to(self.gram.device)
        return Moments(self.gram[chosen][:, chosen], self.total[chosen], self.count)


@dataclass(frozen=True)
class Sampling:
    """What moments are taken over.

    Attributes:
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per batch.
        positions: how many positions of each layer at most, spread evenly over the batches; of a
            layer of many features fewer, about eight for each.

    """

    samples: int
    batch_size: int
    positions: int

    def taken(self, features: int) -> int:
        """Return how many positions of a layer are taken, by the number of its features."""
        enough = max(PER_FEATURE * features, PRODUCTS // features**2)
        return max(1, min(self.positions, enough))


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
        recorder = _Recorder(program, sites, sampling, (count, generator))
        for batch in context.progress.track(stream, "measuring what layers read", total=count):
            recorder.run(*batch.inputs)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(
        self, program: Program, sites: Iterable[Site], sampling: Sampling,
        over: tuple[int, torch.Generator],
    ) -> None:  # fmt: skip
        super().__init__(program.graph_module)
        self.found: dict[str, Moments] = {}
        self._sites = {site.node: site for site in sites}
        self._sampling = sampling
        self._batches, self._generator = over

    def run_node(self, n: fx.Node) -> Any:
        if n in self._sites:
            (value, *_), _ = self.fetch_args_kwargs_from_env(n)
            self._record(self._sites[n], value)
        return super().run_node(n)

    def _record(self, site: Site, value: Tensor) -> None:
        most = max(1, self._sampling.taken(site.channels * site.taps) // self._batches)
        found = features(site, value, most, self._generator)
        name = site.node.name
        if name not in self.found:
            self.found[name] = Moments.zeros(found.shape[1], found.device)
        self.found[name].add(found)


def features(
    site: Site, value: Tensor, most: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Spread what a site reads into (positions, channels times taps).

    Args:
        site: the layer.
        value: what it reads.
        most: how many positions at most, drawn at random; None for all.
        generator: of the draw.

    """
    if not site.kernel:
        return _some(value.flatten(0, -2), most, generator)
    if value.dim() == len(site.kernel) + 1:
        value = value.unsqueeze(0)
    padded = F.pad(value, [amount for both in reversed(site.padding) for amount in (both, both)])
    extent = padded.shape[2:]
    taps = _grid(extent, list(zip(site.kernel, site.dilation, strict=True)))
    slides = zip(extent, site.kernel, site.dilation, site.stride, strict=True)
    places = [
        ((size - step * (k - 1) - 1) // stride + 1, stride) for size, k, step, stride in slides
    ]
    corners = _grid(extent, places)
    batch, flat = len(padded), padded.flatten(2)
    chosen = _some(torch.arange(batch * len(corners)), most, generator)
    where = (corners[chosen % len(corners)].unsqueeze(1) + taps).to(flat.device)
    samples = (chosen // len(corners)).unsqueeze(1).to(flat.device)
    return flat[samples, :, where].transpose(1, 2).flatten(1)


def _grid(extent: Sequence[int], steps: Sequence[tuple[int, int]]) -> Tensor:
    """Flat indices of a grid: along each dimension, how many points and how far apart."""
    found = torch.zeros(1, dtype=torch.long)
    for size, (count, step) in zip(extent, steps, strict=True):
        found = (found.unsqueeze(1) * size + torch.arange(count) * step).flatten()
    return found


def _some(values: Tensor, most: int | None, generator: torch.Generator | None) -> Tensor:
    if most is None or len(values) <= most:
        return values
    order = torch.randperm(len(values), generator=generator)[:most]
    return values[order.to(values.device)]
