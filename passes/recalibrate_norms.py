"""Recompute batch-norm statistics on calibration data.

Before:
    batch_norm: 8x16x32x32 = batch_norm(x, weight, bias, mean, var)   # of the dense model

After:
    batch_norm: 8x16x32x32 = batch_norm(x, weight, bias, mean, var)   # of this program

The mean and the unbiased variance are those of all values that reach a norm over all samples.
Meanwhile each batch is normalised with its own statistics, as in training, but dropout stays off. A
norm that is called several times counts the values of all calls. No gradient is computed. Instance
norms do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.graph.facts import MASKS, PLAN, REMOVED
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.training.norms import measure_norms, norms_of

aten = torch.ops.aten
TRIAL_SAMPLES = 256  # where plans are tried


@dataclass(frozen=True)
class RecalibrateNorms(Pass):
    """Replace running statistics by those of calibration samples.

    Attributes:
        samples: largest number of calibration samples, drawn at random.
        batch_size: largest number of samples per batch; batches are about equal in size.

    """

    samples: int = 1024
    batch_size: int = 128

    name: ClassVar[str] = "recalibrate-norms"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS, PLAN})
    repeats: ClassVar[str | None] = "the statistics are measured and stored again"

    def for_trials(self) -> RecalibrateNorms:
        """Use few samples."""
        return replace(self, samples=min(self.samples, TRIAL_SAMPLES))

    def run(self, program: Program, context: Context) -> Outcome:
        """Measure and replace; changes counts the norms."""
        norms = norms_of(program)
        skips = tuple(
            Skip(node.name, "an instance norm computes its statistics from each sample")
            for node in program.graph.nodes
            if node.target is aten.instance_norm.default and isinstance(node.args[3], fx.Node)
        )
        if not norms:
            return Outcome(0, skips)
        found, total = measure_norms(
            program, context, self.samples, self.batch_size, as_in_training=True
        )
        for (mean, variance), statistics in found.items():
            for name, value in ((mean, statistics.mean), (variance, statistics.variance)):
                set_tensor(program, name, value.to(program.tensor(name).dtype))
        return Outcome(len(norms), skips, {"samples": total})

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """The statistics are numbers, and no variance is negative."""
        for norm in norms_of(program):
            stored: Any = norm.args[3:5]
            mean, variance = (program.tensor(str(node.target)) for node in stored)
            finite = bool(mean.isfinite().all()) and bool(variance.isfinite().all())
            yield f"the statistics of {norm.name} are finite", finite
            yield f"no variance of {norm.name} is negative", bool((variance >= 0).all())
