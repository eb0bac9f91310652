"""Fine-tune the program, with the dense model as a teacher.

Before:
    conv2d: 8x16x32x32 = conv2d(x, <conv1.weight 16x3x3x3>)

After:
    conv2d: 8x16x32x32 = conv2d(x, <conv1.weight 16x3x3x3>)   # with trained values

The loss is ``(1 - distill) * loss(outputs, target) + distill * distance(outputs, dense outputs)``.
The distance is the softened divergence of arXiv 1503.02531 for cross-entropy, and a relative
squared error for other losses. Without labels, the distance is the whole loss. Masked weights stay
zero.

In training, batch norms normalise with the statistics of the batch. Before the first step, their
running statistics, weights and biases are adjusted so that training starts from the function that
evaluation computes. A part of the training samples is held out, and the weights kept are those on
the line from the old to the trained ones with the lowest loss on it: training never ends worse
than it began there. Raises an error if there is no training data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.training.guarding import guarded
from fxprune.training.loop import Schedule, train
from fxprune.training.norms import restate_norms

NORM_SAMPLES, NORM_BATCH = 1024, 128  # that the statistics of norms are taken over


@dataclass(frozen=True)
class Finetune(Schedule, Pass):
    """Fine-tune all parameters.

    Attributes:
        epochs: number of passes over the training data.
        lr: peak learning rate; it rises linearly, then falls to zero along a cosine.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        warmup: fraction of all steps during which the learning rate rises.
        weight_decay: weight decay for weights; biases and norms have none.
        batch_size: samples per step.
        distill: weight of the distance to the dense model, between 0 and 1; the loss on labels has
            the rest.
        temperature: softmax temperature of both models in distillation.
        clip: largest norm of the gradient of one step; 0 for no limit.
        held_out: fraction of the training samples (at most 1,024) that selects the weights to
            keep; 0 keeps the final weights.

    """

    held_out: float = 0.05

    name: ClassVar[str] = "finetune"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    repeats: ClassVar[str | None] = "training goes on from the trained weights"

    def run(self, program: Program, context: Context) -> Outcome:
        """Train; changes counts the parameters that took part."""
        if self.epochs <= 0:
            return Outcome()
        restate_norms(program, context, NORM_SAMPLES, NORM_BATCH)
        found = guarded(
            program, context, self, self.held_out, lambda part: train(program, part, self)
        )
        trained = sum(p.requires_grad for p in program.graph_module.parameters())
        return Outcome(trained, details=found.to_details(), notes=found.notes)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Training did not diverge."""
        parameters = program.graph_module.named_parameters()
        wrong = [name for name, value in parameters if not bool(value.isfinite().all())]
        yield f"the weights are finite ({', '.join(wrong[:3]) or 'all of them'})", not wrong
