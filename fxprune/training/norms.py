"""Batch norms and their statistics: what they read, measured, and norms written in its terms.

A norm computes ``(x - m) / sqrt(v + eps) * w + b``. In evaluation ``m`` and ``v`` are stored; in
training they are the mean and variance of the batch. Where the two are far apart, as after weights
were fitted behind stored statistics, training begins with another function than evaluation has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context

aten = torch.ops.aten
Names = tuple[str, str]  # of a running mean and a running variance


def norms_of(program: Program) -> tuple[fx.Node, ...]:
    """Return the calls of batch norms that store statistics."""
    return tuple(
        node
        for node in program.graph.nodes
        if node.target is aten.batch_norm.default and isinstance(node.args[3], fx.Node)
    )


@dataclass
class Statistics:
    """Count, mean and sum of squared deviations per channel, in float64."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Take those of a batch, channels along its second dimension."""
        variance, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
        count = x.numel() // x.shape[1]
        return cls(count, mean, variance * count)

    def add(self, other: Statistics) -> None:
        """Pool two sets of values (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / total)
        self.deviations = (
            self.deviations + other.deviations
            + difference.square() * (self.count * other.count / total)
        )  # fmt: skip
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The unbiased variance."""
        return self.deviations / max(self.count - 1, 1)


def measure_norms(
    program: Program, context: Context, samples: int, batch_size: int, *, as_in_training: bool
) -> tuple[dict[Names, Statistics], int]:
    """Return statistics of what norms read, by the names of those stored, and the samples' number.

    A norm that is called several times counts all its calls. Dropout stays off.

    Args:
        program: what to run, in evaluation mode, in which it is left.
        context: for calibration samples.
        samples: how many of them at most, drawn at random.
        batch_size: the most samples per batch; batches are about equal.
        as_in_training: norms compute with the statistics of the batch, not with stored ones.

    """
    available = context.samples.calibration
    size, total = _sizes(fixed_batch(program), min(samples, len(available)), batch_size)
    stream = batches(available, size, seed=context.seed, limit=total, device=context.device)
    program.eval()
    with placed(program, context.device), torch.no_grad():
        recorder = _Recorder(program, as_in_training)
        for batch in context.progress.track(stream, "measuring what norms read", -(-total // size)):
            recorder.run(*batch.inputs)
    return recorder.found, total


def _sizes(fixed: int | None, total: int, batch_size: int) -> tuple[int, int]:
    """The samples of a batch and in all."""
    if fixed:
        return fixed, max(total - total % fixed, fixed)
    size = -(-total // -(-total // batch_size))
    # A last batch of one has no variance.
    return size, total - 1 if total % size == 1 and total > 1 else total


class _Recorder(fx.Interpreter):
    """Runs a program and gathers what its norms read."""

    def __init__(self, program: Program, as_in_training: bool) -> None:
        super().__init__(program.graph_module)
        self.found: dict[Names, Statistics] = {}
        self._norms, self._as_in_training = norms_of(program), as_in_training

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._norms:
            return super().run_node(n)
        (x, weight, bias, *_), _ = self.fetch_args_kwargs_from_env(n)
        found, names = Statistics.of(x), _names(n)
        if names in self.found:
            self.found[names].add(found)
        else:
            self.found[names] = found
        if not self._as_in_training:
            return super().run_node(n)
        eps: Any = n.args[7]
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _names(norm: fx.Node) -> Names:
    mean, variance = norm.args[3:5]
    return str(getattr(mean, "target", "")), str(getattr(variance, "target", ""))


def restate_norms(program: Program, context: Context, samples: int, batch_size: int) -> int:
    """Give norms the statistics of what they read, and weights and biases that make up for it.

    The program computes what it did in evaluation, and nearly the same in training. Norms without
    a weight and a bias, and those that share tensors with other calls, stay as they are.

    Args:
        program: what to change, in place.
        context: for calibration samples.
        samples: how many of them at most.
        batch_size: the most samples per batch.

    Returns:
        How many norms were changed.

    """
    readers: Counter[int] = Counter()
    for node in program.tensor_nodes():  # tied tensors have several names
        readers[id(program.tensor(str(node.target)))] += len(node.users)
    own = [norm for norm in norms_of(program) if _owns(program, norm, readers)]
    if not own:
        return 0
    found, _ = measure_norms(program, context, samples, batch_size, as_in_training=False)
    for norm in own:
        _restate(program, norm, found[_names(norm)])
    return len(own)


def _owns(program: Program, norm: fx.Node, readers: Mapping[int, int]) -> bool:
    """Whether a norm has a weight and a bias, and nothing else reads any of its tensors."""
    tensors: Any = norm.args[1:5]
    return all(
        isinstance(x, fx.Node)
        and x.op == "get_attr"
        and readers[id(program.tensor(str(x.target)))] == 1
        for x in tensors
    )


def _restate(program: Program, norm: fx.Node, found: Statistics) -> None:
    tensors: Any = norm.args[1:5]
    names = [str(node.target) for node in tensors]
    old = [program.tensor(name).detach() for name in names]
    weight, bias, mean, variance = (tensor.double() for tensor in old)
    eps: Any = norm.args[7]
    new_mean, new_variance = found.mean.to(mean.device), found.variance.to(mean.device)
    slope = weight / (variance + eps).sqrt()
    values = (
        slope * (new_variance + eps).sqrt(), bias + slope * (new_mean - mean), new_mean,
        new_variance,
    )  # fmt: skip
    for name, tensor, value in zip(names, old, values, strict=True):
        set_tensor(program, name, value.to(tensor.dtype))
