"""Second moments of what layers read: streamed over calibration samples, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.calibration.layer_matrix import drawn_features
from fxprune.calibration.moments import Moments
from fxprune.calibration.stream import calibration_stream, record
from fxprune.graph.hooks import Call
from fxprune.graph.program import Program
from fxprune.implants.implant_types import Site
from fxprune.pipeline.context import Context

BLOCK_ELEMENTS = 2**22  # elements of a block of features in double precision
PER_FEATURE = 8  # positions that a covariance needs at least, for each of its features
PRODUCTS = 2**33  # multiply-accumulates that a covariance may take beyond that


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
    stream = calibration_stream(program, context, sampling.samples, sampling.batch_size)
    generator = torch.Generator().manual_seed(context.seed)
    by_node = {site.node: site for site in sites}
    found: dict[str, Moments] = {}

    def measure_input(call: Call) -> Any:
        site, name = by_node[call.node], call.node.name
        most = max(1, sampling.taken(site.channels * site.taps) // len(stream))
        features = drawn_features(site.node, call.args[0], most, generator)
        if name not in found:
            found[name] = Moments.zeros(1, features.shape[1], 0, features.device)
        for block in features.split(max(1, BLOCK_ELEMENTS // features.shape[1])):
            found[name].add(block.double().T.unsqueeze(0))
        return call.value()

    hooks = dict.fromkeys(by_node, measure_input)
    record(program, context, stream, hooks, "measuring inputs of layers")
    return found
