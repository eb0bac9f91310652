"""Train the program a little, with the dense model as a teacher.

Before:
    conv2d: 8x16x32x32 = conv2d(x, <conv1.weight 16x3x3x3>)

After:
    conv2d: 8x16x32x32 = conv2d(x, <conv1.weight 16x3x3x3>)   # other numbers in it

The loss is ``(1 - distill) * loss(outputs, target) + distill * distance(outputs, dense outputs)``;
the distance is the softened divergence of arXiv 1503.02531 for cross-entropy, and a relative
squared error for other losses. Without labels the distance is all there is. Zeros of masks are
kept. Batch norms first take the statistics of what they read, with weights and biases that make up
for it, since training runs them on batches and would begin as another function otherwise; then they
update their statistics. A part of the training samples is held out, and of points on the way from
the old weights to the trained ones that of the least loss on it is kept: training never ends worse
than it began. Fails, and does not guess, where there is no training data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.training.guarding import guarded
from fxprune.training.loop import Schedule, train
from fxprune.training.norms import restate_norms

NORM_SAMPLES, NORM_BATCH = 1024, 128  # that the statistics of norms are taken over


@dataclass(frozen=True)
class Finetune(Pass):
    """Fine-tune all parameters.

    Attributes:
        epochs: passes over the training data.
        lr: peak learning rate; it rises linearly, then decays to zero as a cosine.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        warmup: the share of all steps over which the rate rises.
        weight_decay: on weights, not on biases and norms.
        batch_size: samples per step.
        distill: weight of the distance to the dense model; the loss on labels weighs the rest.
        temperature: softens both sides of the distillation.
        clip: the largest norm of a step's gradient; 0 for no limit.
        held_out: the share of the training samples that judges, at most 1,024 of them; 0 keeps the
            end of training whatever it is.

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
    held_out: float = 0.05

    name: ClassVar[str] = "finetune"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})

    def run(self, program: Program, context: Context) -> Outcome:
        """Train; changes counts the parameters that took part."""
        if self.epochs <= 0:
            return Outcome()
        schedule = Schedule(**{field.name: getattr(self, field.name) for field in fields(Schedule)})
        restate_norms(program, context, NORM_SAMPLES, NORM_BATCH)
        found = guarded(
            program, context, schedule, self.held_out, lambda part: train(program, part, schedule)
        )
        trained = sum(p.requires_grad for p in program.graph_module.parameters())
        return Outcome(trained, details=found.told())
