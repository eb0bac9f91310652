"""Estimate batch-norm statistics anew on calibration data.

Before:
    batch_norm: 8x16x32x32 = batch_norm(x, weight, bias, mean, var)   # of the dense model

After:
    batch_norm: 8x16x32x32 = batch_norm(x, weight, bias, mean, var)   # of this one

The mean and the unbiased variance are those of all values that a norm sees over all samples, while
each batch is normalised by its own statistics, as in training; dropout stays off. A norm that is
called several times counts all its calls. No gradient is taken. Instance norms are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.context import Context
from fxprune.data import batches
from fxprune.facts import MASKS, PLAN, REMOVED
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline import Facts, Outcome, Pass, Skip
from fxprune.training.evaluate import fixed_batch
from fxprune.training.loop import placed

aten = torch.ops.aten


@dataclass(frozen=True)
class RecalibrateNorms(Pass):
    """Replace running statistics by those of calibration samples.

    Attributes:
        samples: how many calibration samples at most, drawn at random.
        batch_size: the most samples per batch; batches are about equal.

    """

    samples: int = 1024
    batch_size: int = 128

    name: ClassVar[str] = "recalibrate-norms"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS, PLAN})

    def run(self, program: Program, context: Context) -> Outcome:
        """Measure and replace; changes counts the norms."""
        norms = [node for node in program.graph.nodes if _has_statistics(node)]
        skips = tuple(
            Skip(node.name, "an instance norm's statistics are its own sample's")
            for node in program.graph.nodes
            if node.target is aten.instance_norm.default and isinstance(node.args[3], fx.Node)
        )
        if not norms:
            return Outcome(0, skips)
        samples = context.samples.calibration
        size, total = self._sizes(fixed_batch(program), len(samples))
        stream = batches(samples, size, seed=context.seed, limit=total, device=context.device)
        program.eval()
        with placed(program, context.device), torch.no_grad():
            recorder = _Recorder(program)
            for batch in context.progress.track(stream, "recalibrating norms", -(-total // size)):
                recorder.run(*batch.inputs)
            recorder.store()
        return Outcome(len(norms), skips, {"samples": total})

    def _sizes(self, fixed: int | None, available: int) -> tuple[int, int]:
        """The samples of a batch and in all."""
        total = min(self.samples, available)
        if fixed:
            return fixed, max(total - total % fixed, fixed)
        size = -(-total // -(-total // self.batch_size))
        # A last batch of one has no variance.
        return size, total - 1 if total % size == 1 and total > 1 else total


def _has_statistics(node: fx.Node) -> bool:
    return node.target is aten.batch_norm.default and isinstance(node.args[3], fx.Node)


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations per channel, in float64."""

    count: int
    mean: Tensor
    deviations: Tensor

    def add(self, other: _Moments) -> None:
        """Pool two sets of values (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / total)
        self.deviations = (
            self.deviations + other.deviations
            + difference.square() * (self.count * other.count / total)
        )  # fmt: skip
        self.count = total


class _Recorder(fx.Interpreter):
    """Runs batch norms on batch statistics and gathers them, by the names of running ones."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._program = program
        self._moments: dict[tuple[str, str], _Moments] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not _has_statistics(n):
            return super().run_node(n)
        mean_node, variance_node = n.args[3:5]
        names = str(getattr(mean_node, "target", "")), str(getattr(variance_node, "target", ""))
        (x, weight, bias, *_), _ = self.fetch_args_kwargs_from_env(n)
        found = _moments_of(x)
        if names in self._moments:
            self._moments[names].add(found)
        else:
            self._moments[names] = found
        eps: Any = n.args[7]
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)

    def store(self) -> None:
        """Make what was gathered the running statistics."""
        for (mean_name, variance_name), moments in self._moments.items():
            variance = moments.deviations / max(moments.count - 1, 1)
            for name, value in ((mean_name, moments.mean), (variance_name, variance)):
                set_tensor(self._program, name, value.to(self._program.tensor(name).dtype))


def _moments_of(x: Tensor) -> _Moments:
    variance, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    count = x.numel() // x.shape[1]
    return _Moments(count, mean, variance * count)
