"""Batch norms and their statistics: what they read, measured, and norms written in its terms.

A norm computes ``(x - m) / sqrt(v + eps) * w + b``. In evaluation ``m`` and ``v`` are stored; in
training they are the mean and variance of the batch. Where the two are far apart, as after weights
were fitted behind stored statistics, training begins with another function than evaluation has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.calibration.moments import Moments
from fxprune.calibration.stream import calibration_stream, record
from fxprune.graph.hooks import Call
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


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a batch norm reads.

    Attributes:
        mean: per channel, in float64.
        variance: per channel, unbiased, in float64.

    """

    mean: Tensor
    variance: Tensor


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
    stream = calibration_stream(program, context, samples, batch_size, remainder="spread")
    if stream.total % stream.batch_size == 1 and len(stream) > 1:
        stream = replace(stream, total=stream.total - 1)  # a batch of one has no variance
    found: dict[Names, Moments] = {}

    def measure(call: Call) -> Any:
        x, weight, bias = call.args[:3]
        channels = x.double().transpose(0, 1).flatten(1).unsqueeze(1)
        names = _names(call.node)
        if names not in found:
            found[names] = Moments.zeros(len(channels), 1, 0, x.device)
        found[names].add(channels)
        if not as_in_training:
            return call.value()
        eps: Any = call.node.args[7]
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)

    hooks = dict.fromkeys(norms_of(program), measure)
    record(program, context, stream, hooks, "measuring inputs of norms")
    return {names: _statistics(moments) for names, moments in found.items()}, stream.total


def _statistics(moments: Moments) -> Statistics:
    """The mean and the unbiased variance of channels, each a group of its own."""
    spread = moments.covariance[:, 0, 0].clamp_min(0) * moments.count
    return Statistics(moments.mean[:, 0], spread / max(moments.count - 1, 1))


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
    own = [norm for norm in norms_of(program) if _owns(program, norm)]
    if not own:
        return 0
    found, _ = measure_norms(program, context, samples, batch_size, as_in_training=False)
    for norm in own:
        _restate(program, norm, found[_names(norm)])
    return len(own)


def _owns(program: Program, norm: fx.Node) -> bool:
    """Whether a norm has a weight and a bias, and nothing else reads any of its tensors."""
    tensors: Any = norm.args[1:5]
    return all(
        isinstance(x, fx.Node) and x.op == "get_attr" and len(program.readers(str(x.target))) == 1
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
