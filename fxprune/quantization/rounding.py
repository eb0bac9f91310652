"""Adaptive rounding of a program's weights, by the second moments of what layers read."""

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
from fxprune.quantization.adaptive import moved, round_adaptively
from fxprune.quantization.fake_quantizers import Site, fakes
from fxprune.quantization.patterns import pattern_of

MEMORY = 2**30  # bytes of moments in one walk over the samples
HELD_OUT = 4  # of so many batches one judges
POSITIONS, PER_FEATURE = 32768, 32  # of the inputs, in all samples


@dataclass(frozen=True)
class Rounded:
    """What rounding moves a layer's outputs by, relative to the nearest codes, on other samples.

    Attributes:
        weight: the layer's weight.
        share: the mean square over that of the nearest codes.
        turned: how many codes are not the nearest.

    """

    weight: str
    share: float
    turned: int


@dataclass(frozen=True)
class _Job:
    """A fake-quantised weight, and the layers that multiply by it."""

    site: Site
    calls: tuple[fx.Node, ...]


def round_weights(
    program: Program, context: Context, samples: int, batch_size: int, *, means: bool
) -> tuple[Rounded, ...]:
    """Put every fake-quantised weight on the codes that move its layer's outputs least.

    Where the codes that were found are no better than the nearest on samples that are held out,
    an output keeps the nearest.

    Args:
        program: with fake-quantisers.
        context: for calibration samples.
        samples: how many of them at most.
        batch_size: per step.
        means: whether biases will take up what the means of outputs move by.

    """
    program.refresh()  # the features of a call are told by the values of nodes
    found = []
    for jobs in _shares(program):
        fitted, judging = _gather(program, context, jobs, samples, batch_size)
        work = zip(jobs, fitted, judging, strict=True)
        tracked = context.progress.track(work, "rounding weights", len(jobs))
        found += [_settle(program, *one, means) for one in tracked]
    return tuple(found)


def _shares(program: Program) -> Iterator[list[_Job]]:
    """Yield as many weights at a time as the memory has room for their moments."""
    share: list[_Job] = []
    held = 0
    for site in fakes(program):
        if not site.symmetric:
            continue
        calls = tuple(node for node in site.node.users if pattern_of(node) is not None)
        rows = weight_rows(calls[0], program.tensor(str(site.value.target)))
        size = 2 * 8 * len(rows) * rows.shape[2] ** 2
        if share and held + size > MEMORY:
            yield share
            share, held = [], 0
        share.append(_Job(site, calls))
        held += size
    if share:
        yield share


def _gather(
    program: Program, context: Context, jobs: Sequence[_Job], samples: int, batch_size: int
) -> tuple[list[Moments], list[Moments]]:
    """The moments of the inputs of layers, of most samples and of those that judge."""
    available = min(samples, len(context.samples.calibration))
    size = max(1, min(batch_size, available // HELD_OUT))
    stream = calibration_stream(program, context, samples, size, remainder="drop")
    watched = {call: number for number, job in enumerate(jobs) for call in job.calls}
    sums: tuple[list[Moments], list[Moments]] = (
        [_empty(program, job, context.device) for job in jobs],
        [_empty(program, job, context.device) for job in jobs],
    )
    program.eval()
    with placed(program, context.device), torch.no_grad():
        tracked = context.progress.track(stream, "moments", len(stream))
        for number, batch in enumerate(tracked):
            judges = number % HELD_OUT == HELD_OUT - 1
            visit(program, batch.inputs, _gathering(watched, sums[judges], stream.total))
    fitted, judging = sums
    return fitted, judging if judging[0].count else fitted


def _empty(program: Program, job: _Job, device: str) -> Moments:
    rows = weight_rows(job.calls[0], program.tensor(str(job.site.value.target)))
    return Moments.zeros(len(rows), rows.shape[2], 0, torch.device(device))


def _gathering(
    watched: Mapping[fx.Node, int], sums: Sequence[Moments], samples: int
) -> dict[fx.Node, Hook]:
    """Hooks that add what layers read to their moments."""

    def gather(call: Call) -> Any:
        moments, value = sums[watched[call.node]], call.value()
        positions = max(POSITIONS, PER_FEATURE * moments.gram.shape[1])
        some = PositionSample(-(-positions // samples), torch.Generator().manual_seed(0))
        for x, _ in blocks(call.node, call.args[0], value, some):
            moments.add(x)
        return value

    return dict.fromkeys(watched, gather)


def _settle(program: Program, job: _Job, fitted: Moments, judging: Moments, means: bool) -> Rounded:
    """Choose the codes of one weight."""
    name = str(job.site.value.target)
    weight = program.tensor(name).detach()
    scale = program.tensor(job.site.key).detach()
    wide = scale.double().view(-1, *[1] * (weight.dim() - 1))
    steps = weight_rows(job.calls[0], weight.double() / wide)
    if means and argument(job.calls[0], "bias") is not None:
        fitted, judging = fitted.centred(), judging.centred()
    home = fitted.gram.device
    nearest = steps.round().clamp(-job.site.high, job.site.high)
    codes = round_adaptively(steps.to(home), fitted.gram, job.site.high).to(steps.device)
    before, after = (
        moved((one - steps).to(home), judging.gram).to(steps.device) for one in (nearest, codes)
    )
    better = after < before
    codes = torch.where(better.unsqueeze(2), codes, nearest)
    set_tensor(program, name, (codes.flatten(0, 1).view(weight.shape) * wide).to(weight.dtype))
    powers = scale.double().square().view(before.shape)
    left, whole = ((x * powers).sum() for x in (torch.where(better, after, before), before))
    share = float(left / whole) if float(whole) else 1.0
    return Rounded(name, share, int((codes != nearest).count_nonzero()))


def to_details(rounded: Sequence[Rounded]) -> dict[str, Any]:
    """Return details for the report."""
    shares = torch.tensor([one.share for one in rounded])
    return {
        "turned": sum(one.turned for one in rounded),
        "error_of_nearest": {one.weight: one.share for one in rounded},
        "mean_share": float(shares.mean()) if rounded else 1.0,
    }
