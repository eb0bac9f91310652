"""Training a program: one loop for fine-tuning and for quantisation-aware training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.context import Context
from fxprune.data import batches
from fxprune.datasets import Samples
from fxprune.errors import FxpruneError, InputError
from fxprune.evaluate import class_axis, fixed_batch, logits_of
from fxprune.facts import MASKS
from fxprune.program import Program
from fxprune.sensitivity_model import kind_of

LossOf = Callable[[Any, tuple[Any, ...], Any], Tensor]


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
    lr: float = 0.02
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
    parameters = [p for p in program.graph_module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("no parameter requires a gradient, so there is nothing to train")
    history: list[Epoch] = []
    with placed(program, context.device), _seeded(context), _training(program):
        optimizer = _optimizer(parameters, schedule)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, _cosine(steps * schedule.epochs, schedule.warmup)
        )
        loss_of, project = _loss(context, schedule), _projection(program)

        def step(inputs: tuple[Any, ...], target: Any) -> Tensor:
            loss = loss_of(program(*inputs), inputs, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if schedule.clip:
                nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            rates.step()
            project()
            return loss.detach()

        for epoch in range(schedule.epochs):
            if on_epoch is not None:
                on_epoch(epoch)
            start, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            stream = batches(
                samples, size, seed=context.seed + epoch, limit=steps * size, device=context.device
            )
            title = f"epoch {epoch + 1}/{schedule.epochs}, " + (
                f"loss {history[-1].loss:.4f}" if history else f"rate {schedule.lr:g}"
            )
            losses = [
                step(b.inputs, b.target) for b in context.progress.track(stream, title, steps)
            ]
            mean = float(torch.stack(losses).double().mean())
            if not math.isfinite(mean):
                raise FxpruneError(
                    f"training diverged: the mean loss of epoch {epoch + 1} is {mean}; "
                    f"lower lr, which is {schedule.lr:g}"
                )
            history.append(Epoch(mean, lr, time.perf_counter() - start))
    return tuple(history)


def _supply(program: Program, context: Context, schedule: Schedule) -> tuple[Samples, int, int]:
    """The training samples, the size of a batch, and the whole batches in an epoch."""
    samples = context.samples.train
    if samples is None:
        raise InputError("there is no training data; give a train part, or run without epochs")
    fixed = fixed_batch(program)
    size = fixed or min(schedule.batch_size, len(samples))
    if size > len(samples):
        raise InputError(
            f"the model is captured with a fixed batch of {size}, but there are only "
            f"{len(samples)} training samples; give more, or capture it with a smaller batch"
        )
    return samples, size, len(samples) // size


@contextmanager
def placed(program: Program, device: str) -> Iterator[None]:
    """Have a program on a device for a while, then bring it back."""
    first = next(iter(program.graph_module.parameters()), None)
    home = first.device if first is not None else torch.device(device)
    program.to(device)
    try:
        yield
    finally:
        program.to(home)


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


def _loss(context: Context, schedule: Schedule) -> LossOf:
    """The loss on labels and the distance to the dense model, weighted."""
    kind = kind_of(context.loss)
    if schedule.distill and context.dense is None:
        raise InputError("distillation needs the dense model; set Context.dense, or distill=0")
    dense = context.dense.copy().eval().to(context.device) if context.dense else None

    def of_labels(outputs: Any, target: Any) -> Tensor:
        if kind == "other":
            return context.loss(outputs, target)
        logits = logits_of(outputs)
        if kind == "cross-entropy" and class_axis(logits, target) == -1 and logits.dim() > 2:
            logits = logits.movedim(-1, 1)  # token logits; cross_entropy wants classes second
        return context.loss(logits, target)

    def loss(outputs: Any, inputs: tuple[Any, ...], target: Any) -> Tensor:
        weight = schedule.distill if target is not None else 1.0
        if dense is None and weight:
            raise InputError("without labels the dense model has to teach; set Context.dense")
        parts = [] if weight == 1 else [(1 - weight) * of_labels(outputs, target)]
        if dense is not None and weight:
            with torch.no_grad():
                wanted = dense(*inputs)
            if kind == "cross-entropy":
                apart = divergence(logits_of(outputs), logits_of(wanted), schedule.temperature)
            else:
                apart = relative_distance(outputs, wanted)
            parts.append(weight * apart)
        return torch.stack(parts).sum()

    return loss


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened predictions, times the squared temperature.

    Averaged over samples (and pixels or tokens); see arXiv 1503.02531, section 2.1.
    """
    axis = class_axis(wanted)
    actual = torch.log_softmax(logits / temperature, axis)
    expected = torch.log_softmax(wanted / temperature, axis)
    return (expected.exp() * (expected - actual)).sum(axis).mean() * temperature**2


def relative_distance(outputs: Any, wanted: Any) -> Tensor:
    """Squared error relative to the wanted output's power, averaged over floating-point outputs."""
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
    errors = [
        (a - b).square().mean() / b.square().mean().clamp_min(1e-12)
        for a, b in pairs
        if isinstance(b, Tensor) and b.is_floating_point()
    ]
    return torch.stack(errors).mean()


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
