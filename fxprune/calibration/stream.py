"""Calibration batches: which samples run through a program, and in what portions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import Batch, batches
from fxprune.data.datasets import Samples
from fxprune.errors import InputError
from fxprune.graph.hooks import Hook, visit
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context

Remainder = Literal["keep", "drop", "spread"]


@dataclass(frozen=True, eq=False)
class CalibrationStream:
    """Batches of calibration samples, drawn at random; the same ones at every iteration.

    Attributes:
        samples: the calibration set.
        batch_size: samples per batch; the last batch may be smaller.
        total: how many samples all batches have together.
        seed: of the draw.
        device: where the batches go.

    """

    samples: Samples
    batch_size: int
    total: int
    seed: int
    device: str

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.total // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return batches(
            self.samples, self.batch_size, seed=self.seed, limit=self.total, device=self.device
        )


def calibration_stream(
    program: Program,
    context: Context,
    samples: int,
    batch_size: int,
    *,
    remainder: Remainder = "keep",
) -> CalibrationStream:
    """Choose the calibration batches for a program.

    A program that was captured with a fixed batch size gets whole batches of that size.

    Args:
        program: what they are to run through.
        context: calibration samples, seed and device.
        samples: the largest number of samples.
        batch_size: the largest number of samples per batch.
        remainder: samples that do not fill a batch make a smaller one (``keep``), are dropped
            (``drop``; a set smaller than a batch is one batch), or are spread, so that all batches
            have about the same size.

    Raises:
        InputError: there are no calibration samples, or fewer than the fixed batch size.

    """
    available, fixed = context.samples.calibration, fixed_batch(program)
    if len(available) < (fixed or 1):
        raise InputError(
            f"calibration needs at least {fixed or 1} samples and has {len(available)}; give more "
            "data" + (", or capture the model with a smaller batch" if fixed else "")
        )
    total = min(samples, len(available))
    size = fixed or min(batch_size, total)
    if fixed or remainder == "drop":
        total = max(total // size, 1) * size
    elif remainder == "spread":
        size = -(-total // -(-total // size))
    return CalibrationStream(available, size, total, context.seed, context.device)


def record(
    program: Program,
    context: Context,
    stream: CalibrationStream,
    hooks: Mapping[fx.Node, Hook],
    title: str,
) -> None:
    """Run batches through a program, without gradients, as far as the last node with a hook.

    Args:
        program: the program, which is put into evaluation mode.
        context: device and progress.
        stream: the batches.
        hooks: what to do at which nodes; see ``fxprune.graph.hooks``.
        title: of the progress bar.

    """
    program.eval()
    with placed(program, context.device), torch.no_grad():
        for batch in context.progress.track(stream, title, len(stream)):
            visit(program, batch.inputs, hooks)
