"""Adaptive rounding of a program's weights, by the second moments of the inputs of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.calibration.layer_matrix import PositionSample, blocks, weight_rows
from fxprune.calibration.moments import Moments
from fxprune.calibration.running import placed
from fxprune.calibration.stream import calibration_stream
from fxprune.graph.hooks import Call, Hook, visit
from fxprune.graph.node_args import argument
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context
from fxprune.quantization.adaptive import round_adaptively, squared_change
from fxprune.quantization.fake_quantizers import QuantizerSite, fake_quantizer_sites
from fxprune.quantization.patterns import pattern_of

MAX_MOMENTS_BYTES = 2**30  # of the layers that are measured in one pass over the samples
HELD_OUT_EVERY = 4  # every so many batches, one is held out
MIN_POSITIONS, POSITIONS_PER_FEATURE = 32768, 32  # of the inputs, over all samples


@dataclass(frozen=True)
class Rounded:
    """The error of a layer's outputs by rounding, relative to nearest rounding, on other samples.

    Attributes:
        weight: the name of the layer's weight.
        share: the mean squared error, relative to that of rounding to nearest.
        turned: the number of weights that are not rounded to nearest.

    """

    weight: str
    share: float
    turned: int


@dataclass(frozen=True)
class _RoundingTask:
    """A fake-quantised weight, and the layers that multiply by it."""

    site: QuantizerSite
    calls: tuple[fx.Node, ...]


def round_weights(
    program: Program, context: Context, samples: int, batch_size: int, *, means: bool
) -> tuple[Rounded, ...]:
    """Round every fake-quantised weight so that the outputs of its layer change least.

    If that is no better than rounding to nearest on held-out samples, an output is rounded to
    nearest.

    Args:
        program: a program with fake-quantisers.
        context: calibration samples, device and seed.
        samples: largest number of calibration samples.
        batch_size: samples per batch.
        means: whether biases will be corrected for the shift of mean outputs.

    """
    program.refresh()  # fake-quantisers have no shapes yet
    found = []
    for tasks in _shares(program):
        fitted, judging = _gather(program, context, tasks, samples, batch_size)
        work = zip(tasks, fitted, judging, strict=True)
        tracked = context.progress.track(work, "rounding weights", len(tasks))
        found += [_round(program, *one, means) for one in tracked]
    return tuple(found)


def _shares(program: Program) -> Iterator[list[_RoundingTask]]:
    """Yield as many weights at a time as memory allows for their moments."""
    share: list[_RoundingTask] = []
    held = 0
    for site in fake_quantizer_sites(program):
        if not site.symmetric:
            continue
        calls = tuple(node for node in site.node.users if pattern_of(node) is not None)
        rows = weight_rows(calls[0], program.tensor(str(site.value.target)))
        size = 2 * 8 * len(rows) * rows.shape[2] ** 2
        if share and held + size > MAX_MOMENTS_BYTES:
            yield share
            share, held = [], 0
        share.append(_RoundingTask(site, calls))
        held += size
    if share:
        yield share


def _gather(
    program: Program,
    context: Context,
    tasks: Sequence[_RoundingTask],
    samples: int,
    batch_size: int,
) -> tuple[list[Moments], list[Moments]]:
    """The moments of the inputs of layers, over the fitted and over the held-out samples."""
    available = min(samples, len(context.samples.calibration))
    size = max(1, min(batch_size, available // HELD_OUT_EVERY))
    stream = calibration_stream(program, context, samples, size, remainder="drop")
    watched = {call: number for number, task in enumerate(tasks) for call in task.calls}
    sums: tuple[list[Moments], list[Moments]] = (
        [_empty(program, task, context.device) for task in tasks],
        [_empty(program, task, context.device) for task in tasks],
    )
    program.eval()
    with placed(program, context.device), torch.no_grad():
        tracked = context.progress.track(stream, "moments", len(stream))
        for number, batch in enumerate(tracked):
            judges = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            visit(program, batch.inputs, _gathering(watched, sums[judges], stream.total))
    fitted, judging = sums
    return fitted, judging if judging[0].count else fitted


def _empty(program: Program, task: _RoundingTask, device: str) -> Moments:
    rows = weight_rows(task.calls[0], program.tensor(str(task.site.value.target)))
    return Moments.zeros(len(rows), rows.shape[2], 0, torch.device(device))


def _gathering(
    watched: Mapping[fx.Node, int], sums: Sequence[Moments], samples: int
) -> dict[fx.Node, Hook]:
    """Hooks that add the inputs of layers to their moments."""

    def gather(call: Call) -> Any:
        moments, value = sums[watched[call.node]], call.value()
        positions = max(MIN_POSITIONS, POSITIONS_PER_FEATURE * moments.gram.shape[1])
        some = PositionSample(-(-positions // samples), torch.Generator().manual_seed(0))
        for x, _ in blocks(call.node, call.args[0], value, some):
            moments.add(x)
        return value

    return dict.fromkeys(watched, gather)


def _round(
    program: Program, task: _RoundingTask, fitted: Moments, judging: Moments, means: bool
) -> Rounded:
    """Round one weight."""
    name = str(task.site.value.target)
    weight = program.tensor(name).detach()
    scale = program.tensor(task.site.key).detach()
    wide = scale.double().view(-1, *[1] * (weight.dim() - 1))
    steps = weight_rows(task.calls[0], weight.double() / wide)
    if means and argument(task.calls[0], "bias") is not None:
        fitted, judging = fitted.centred(), judging.centred()
    device = fitted.gram.device
    nearest = steps.round().clamp(-task.site.high, task.site.high)
    integers = round_adaptively(steps.to(device), fitted.gram, task.site.high).to(steps.device)
    before, after = (
        squared_change((one - steps).to(device), judging.gram).to(steps.device)
        for one in (nearest, integers)
    )
    better = after < before
    integers = torch.where(better.unsqueeze(2), integers, nearest)
    set_tensor(program, name, (integers.flatten(0, 1).view(weight.shape) * wide).to(weight.dtype))
    powers = scale.double().square().view(before.shape)
    remaining, whole = ((x * powers).sum() for x in (torch.where(better, after, before), before))
    share = float(remaining / whole) if float(whole) else 1.0
    return Rounded(name, share, int((integers != nearest).count_nonzero()))


def to_details(rounded: Sequence[Rounded]) -> dict[str, Any]:
    """Return details for the report."""
    shares = torch.tensor([one.share for one in rounded])
    return {
        "turned": sum(one.turned for one in rounded),
        "error_of_nearest": {one.weight: one.share for one in rounded},
        "mean_share": float(shares.mean()) if rounded else 1.0,
    }
