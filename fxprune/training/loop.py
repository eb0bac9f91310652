"""Training a program: one loop for fine-tuning and for quantisation-aware training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import Batch, batches
from fxprune.data.datasets import Samples
from fxprune.errors import FxpruneError, InputError
from fxprune.graph.facts import MASKS
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.training.distillation import objective


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        epochs: passes over the training data.
        lr: peak learning rate; it rises linearly, then decays to zero as a cosine.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        warmup: the share of all steps over which the rate rises.
        weight_decay: on parameters of two dimensions or more: not on biases and norms.
        batch_size: samples per step; what is left over at the end of an epoch is left out.
        distill: weight of the distance to the dense model's outputs; the loss on labels weighs
            the rest. Without labels distillation is all there is.
        temperature: softens both sides of the distillation.
        clip: the largest norm of a step's gradient; 0 for no limit.

    """

    epochs: int = 1
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 64
    distill: float = 0.7
    temperature: float = 4.0
    clip: float = 5.0


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training came to: its mean loss, its last rate, its time."""

    loss: float
    lr: float
    seconds: float


def train(
    program: Program,
    context: Context,
    schedule: Schedule,
    *,
    on_epoch: Callable[[int], None] | None = None,
) -> tuple[Epoch, ...]:
    """Train the program's parameters in place; it ends in evaluation mode, on its old device.

    Masked weights stay zero. The batches of epoch ``e`` are shuffled by ``seed + e``. Of a model
    with several outputs, cross-entropy and a squared error take the logits (see ``logits_of``);
    any other loss is handed the outputs as they are.

    Args:
        program: what to train.
        context: data, loss, device, seed, progress, and the dense model to learn from.
        schedule: how.
        on_epoch: called with the epoch's number before each epoch.

    Raises:
        InputError: there is nothing to train, or nothing to train on.
        FxpruneError: the loss is no longer finite.

    """
    samples, size, steps = _supply(program, context, schedule)
    with placed(program, context.device), _seeded(context), _training(program):
        step = _Step(program, context, schedule, steps * schedule.epochs)
        history: list[Epoch] = []
        for number in range(schedule.epochs):
            if on_epoch is not None:
                on_epoch(number)
            start, lr = time.perf_counter(), step.lr
            stream = batches(
                samples, size, seed=context.seed + number, limit=steps * size, device=context.device
            )
            done = f"loss {history[-1].loss:.4f}" if history else f"lr {schedule.lr:g}"
            title = f"epoch {number + 1}/{schedule.epochs}, {done}"
            losses = [step(batch) for batch in context.progress.track(stream, title, steps)]
            mean = float(torch.stack(losses).double().mean())
            if not math.isfinite(mean):
                raise FxpruneError(
                    f"training diverged: the mean loss of epoch {number + 1} is {mean}; "
                    f"lower lr, which is {schedule.lr:g}"
                )
            history.append(Epoch(mean, lr, time.perf_counter() - start))
    return tuple(history)


class _Step:
    """One step of the optimiser, for a batch; keeps the state that lasts from step to step."""

    def __init__(self, program: Program, context: Context, schedule: Schedule, steps: int) -> None:
        self._program, self._clip = program, schedule.clip
        self._parameters = [p for p in program.graph_module.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("no parameter requires a gradient, so nothing can be trained")
        self._optimizer = _optimizer(self._parameters, schedule)
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, _cosine(steps, schedule.warmup)
        )
        self._loss = objective(context, schedule.distill, schedule.temperature)
        self._project = _projection(program)

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return float(self._rates.get_last_lr()[0])

    def __call__(self, batch: Batch) -> Tensor:
        loss = self._loss(self._program(*batch.inputs), batch.inputs, batch.target)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._rates.step()
        self._project()
        return loss.detach()


def _supply(program: Program, context: Context, schedule: Schedule) -> tuple[Samples, int, int]:
    """The training samples, the size of a batch, and the whole batches in an epoch."""
    samples = context.samples.train
    if samples is None:
        raise InputError("there is no training data; give training samples, or set epochs to 0")
    fixed = fixed_batch(program)
    size = fixed or min(schedule.batch_size, len(samples))
    if size > len(samples):
        raise InputError(
            f"the model is captured with a fixed batch of {size}, but there are only "
            f"{len(samples)} training samples; give more samples, or capture the model with a "
            "smaller batch"
        )
    return samples, size, len(samples) // size


@contextmanager
def _seeded(context: Context) -> Iterator[None]:
    """Let dropout draw from the context's seed, and leave the caller's generators as they were."""
    kind = torch.device(context.device)
    with torch.random.fork_rng(devices=[] if kind.type == "cpu" else [kind]):
        torch.manual_seed(context.seed)
        yield


@contextmanager
def _training(program: Program) -> Iterator[None]:
    program.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        program.eval()


def _optimizer(parameters: list[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr)
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rise = round(warmup * steps)

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))

    return rate


def _projection(program: Program) -> Callable[[], None]:
    """What puts masked weights back to zero after a step."""
    masks = program.facts.get(MASKS.name)
    kept = []
    for name, keep in masks.keep.items() if masks else ():
        weight = program.tensor(name)
        kept.append((weight, keep.to(weight.device)))

    def project() -> None:
        with torch.no_grad():
            for weight, keep in kept:
                weight.mul_(keep)

    return project
