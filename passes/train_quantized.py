"""Find the scales of observed values, and train the weights that will be rounded.

Before:
    observe: 8x16x32x32 = fxprune.observe(relu, relu, 0, 255, False, -1)

After:
    fake_quantize: 8x16x32x32 = fxprune.fake_quantize(relu, <quantizers.relu.scale scalar>,
        <quantizers.relu.zero_point uint8 scalar>, 0, 255, -1)

Calibration runs samples through the program in floating point; observers take the range of what
they see, and weights that of their largest value per output channel. Fake-quantisers then round
to what codes can tell, and biases take back what rounding shifts in the means of layers.

With epochs, the weights are trained through the rounding, whose gradient passes straight through,
with the dense model as a teacher (see finetune). The scales are measured again before each epoch,
until ``freeze`` of them are done, or are trained with the weights. Zeros of masks are kept. Fails
where there is no data to calibrate or to train on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from fxprune.context import Context
from fxprune.facts import CALIBRATED, MASKS, OBSERVED, REMOVED
from fxprune.pipeline import Facts, Outcome, Pass
from fxprune.program import Program
from fxprune.quantization import remeasure, settle, sites, walk
from fxprune.quantization_bias import correct_biases
from fxprune.quantization_observers import Method
from fxprune.quantization_scales import learned_scales
from fxprune.quantization_sensitivity import disagreement, rounding_costs, to_recover
from fxprune.training import Schedule, train


@dataclass(frozen=True)
class TrainQuantized(Pass):
    """Calibrate observers, turn them into fake-quantisers, and train.

    Attributes:
        observer: the range of activations: of all values, averaged over batches, without the
            outermost ten-thousandth, of least squared error, or of least divergence.
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per step.
        search_weights: take the weight scales of least squared error.
        bias_correction: correct the means of layers after calibration.
        epochs: passes over the training data; 0 only calibrates.
        lr: peak learning rate.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        weight_decay: on weights.
        distill: weight of the distance to the dense model; the loss on labels weighs the rest.
        temperature: softens both sides of the distillation.
        learn_scales: train the scales too (arXiv 1902.08153).
        freeze: the share of epochs after which scales are no longer measured again.
        sensitivity: tell by weight how much rounding in its layer raises the loss, dearest first.
        recover: name the layers to leave in floating point, to win back so many points of
            agreement with the unrounded program; 0 for none.

    """

    observer: Method = "mse"
    samples: int = 512
    batch_size: int = 64
    search_weights: bool = False
    bias_correction: bool = True
    epochs: int = 0
    lr: float = 0.002
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    learn_scales: bool = False
    freeze: float = 0.5
    sensitivity: bool = False
    recover: float = 0.0

    name: ClassVar[str] = "train-quantized"
    needs: ClassVar[Facts] = frozenset({OBSERVED})
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    gives: ClassVar[Facts] = frozenset({CALIBRATED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Calibrate and train; changes counts fake-quantisers."""
        found = sites(program)
        observers = walk(program, context, found, self.observer, self.samples, self.batch_size)
        count = settle(program, found, observers, self.observer, search_weights=self.search_weights)
        details: dict[str, Any] = {}
        if self.bias_correction:
            details["corrected"] = correct_biases(program, context, self.samples)
        if self.epochs > 0:
            details["epochs"] = self._train(program, context)
        if self.sensitivity or self.recover:
            details |= self._rank(program, context)
        program.put(CALIBRATED, program.get(OBSERVED))
        return Outcome(count, details=details)

    def _rank(self, program: Program, context: Context) -> dict[str, Any]:
        costs = rounding_costs(program, context, self.samples, self.batch_size)
        if not self.recover:
            return {"sensitivity": costs}
        gap = disagreement(program, context, self.samples, self.batch_size)
        names = to_recover(costs, self.recover, gap)
        note = (
            f"rounding changes {gap:.2f} % of predictions; to win back {self.recover:g} points, "
            f"leave in floating point: insert-observers{{fp32=[{','.join(names)}]}}"
        )
        return {"sensitivity": costs, "notes": [note]}

    def _train(self, program: Program, context: Context) -> list[dict[str, Any]]:
        schedule = Schedule(
            self.epochs, self.lr, self.optimizer, weight_decay=self.weight_decay,
            batch_size=self.batch_size, distill=self.distill, temperature=self.temperature,
        )  # fmt: skip
        if self.learn_scales:
            with learned_scales(program):
                return [asdict(epoch) for epoch in train(program, context, schedule)]

        def measure(epoch: int) -> None:
            if 0 < epoch <= self.freeze * self.epochs:
                remeasure(program, context, self.observer, self.samples, self.batch_size)

        history = train(program, context, schedule, on_epoch=measure)
        return [asdict(epoch) for epoch in history]
