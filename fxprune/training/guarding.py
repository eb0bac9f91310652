"""Training that cannot end worse than it began, as samples tell that it has not seen.

The weights before and after training are two ends of a line; of points along it that of the least
loss on held-out samples is kept, the beginning among them. Between the ends the loss is often
lower than at either (arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.data.datasets import Samples
from fxprune.data.roles import Data, hold_out
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.training.distillation import LossOf, objective
from fxprune.training.loop import Epoch, Schedule

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST = 1024  # held-out samples
FEWEST = 32  # under which their loss says nothing

Train = Callable[[Context], tuple[Epoch, ...]]


@dataclass(frozen=True)
class Guarded:
    """What training came to.

    Attributes:
        epochs: of the training.
        held_out: how many samples judged it.
        losses: by share of the way from the old weights to the trained ones, the loss on them.
        kept: the share that was kept.

    """

    epochs: tuple[Epoch, ...]
    held_out: int = 0
    losses: Mapping[float, float] | None = None
    kept: float = 1.0

    def to_details(self) -> dict[str, Any]:
        """Return figures for the report."""
        details: dict[str, Any] = {"epochs": [asdict(epoch) for epoch in self.epochs]}
        if self.losses is None:
            return details
        losses = {f"{share:g}": loss for share, loss in self.losses.items()}
        return details | {"held_out": self.held_out, "held_out_losses": losses, "kept": self.kept}

    @property
    def notes(self) -> tuple[str, ...]:
        """Say so if not the end of training was kept."""
        if self.losses is None or self.kept == 1:
            return ()
        last, best = self.losses[1.0], self.losses[self.kept]
        return (
            f"fine-tuning: kept the weights {self.kept:.0%} of the way (validation loss {best:.4g} "
            f"on {self.held_out:,} samples); the final weights were worse ({last:.4g})",
        )


def guarded(
    program: Program, context: Context, schedule: Schedule, share: float, train: Train
) -> Guarded:
    """Train on all but a share of the samples, and keep what is best on that share.

    Args:
        program: what is trained, in place.
        context: for samples and loss.
        schedule: what the loss is to be.
        share: of the training samples, at most 1,024 of them; 0, or where this comes to fewer than
            32 samples, trains on all and keeps the end.
        train: trains the program in a context.

    """
    parts = _parts(program, context, share)
    if parts is None:
        return Guarded(train(context))
    held_out, rest = parts
    data = context.samples
    before = _state(program)
    reduced = replace(context, data=Data(data.calibration, rest, data.eval, data.notes))
    epochs = train(reduced)
    after = _state(program)
    loss = objective(context, schedule.distill, schedule.temperature)
    losses = {}
    for part in SHARES:
        _put(program, before, after, part)
        losses[part] = _mean(program, context, loss, held_out, schedule.batch_size)
    kept = min(losses, key=lambda part: (losses[part], part))
    _put(program, before, after, kept)
    return Guarded(epochs, len(held_out), losses, kept)


def _parts(program: Program, context: Context, share: float) -> tuple[Samples, Samples] | None:
    """The samples that judge, and those that train."""
    samples, size = context.samples.train, fixed_batch(program) or 1
    if samples is None or not share:
        return None
    count = min(round(share * len(samples)), MOST) // size * size
    if count < FEWEST or len(samples) - count < size:
        return None
    return hold_out(samples, context.seed, count / len(samples))


def _state(program: Program) -> dict[str, Tensor]:
    module = program.graph_module
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def _put(
    program: Program, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float
) -> None:
    """Put the weights, statistics and scales that lie so far along the way."""
    with torch.no_grad():
        for name, end in after.items():
            start = before[name]
            if share in (0.0, 1.0) or not end.is_floating_point():
                value = end if share else start
            else:
                value = torch.lerp(start, end, share)
            program.tensor(name).copy_(value)


def _mean(
    program: Program, context: Context, loss: LossOf, samples: Samples, batch_size: int
) -> float:
    """The mean loss over samples, in evaluation mode."""
    program.eval()
    total, count = 0.0, 0
    with placed(program, context.device), torch.no_grad():
        for batch in batches(samples, fixed_batch(program) or batch_size, device=context.device):
            one = loss(program(*batch.inputs), batch.inputs, batch.target)
            total += float(one) * len(batch)
            count += len(batch)
    return total / count
