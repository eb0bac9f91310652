"""Find the scales of observed values, and train the weights that will be rounded.

Before:
    observe: 8x16x32x32 = fxprune.observe(relu, relu, 0, 255, False, -1)

After:
    fake_quantize: 8x16x32x32 = fxprune.fake_quantize(relu, <quantizers.relu.scale scalar>,
        <quantizers.relu.zero_point uint8 scalar>, 0, 255, -1)

Calibration runs samples through the program in floating point; observers take the range of what
they see, and weights that of their largest value per output channel. Fake-quantisers then round
to what codes can tell (weights to the nearest code, or adaptively), and biases take back what
rounding shifts in the means of layers. To win back predictions, the layers whose rounding costs
most are left in floating point (``recover``).

With epochs, the weights are trained through the rounding, whose gradient passes straight through,
with the dense model as a teacher (see finetune). The scales are measured again before each epoch,
until ``freeze`` of them are done, or are trained with the weights. Zeros of masks are kept, and
samples that are held out tell how far to go (see finetune). Fails where there is no data to
calibrate or to train on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fxprune.graph.facts import CALIBRATED, MASKS, OBSERVED, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.quantization.bias import correct_biases
from fxprune.quantization.fake_quantizers import remeasure, settle, sites, walk
from fxprune.quantization.layer_costs import rounding_costs
from fxprune.quantization.observers import Method
from fxprune.quantization.recovery import recover
from fxprune.quantization.rounding import round_weights, told
from fxprune.quantization.scales import learned_scales
from fxprune.training.guarding import guarded
from fxprune.training.loop import Epoch, Schedule, train


@dataclass(frozen=True)
class TrainQuantized(Pass):
    """Calibrate observers, turn them into fake-quantisers, and train.

    Attributes:
        observer: the range of activations: of all values, averaged over batches, without the
            outermost ten-thousandth, of least squared error, or of least divergence.
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per step.
        search_weights: take the weight scales of least squared error.
        rounding: of weights, to the nearest code, or to the one above or below, so that on
            calibration samples a layer's output moves least (arXiv 2004.10568, 2210.17323).
        bias_correction: correct the means of layers after calibration.
        epochs: passes over the training data; 0 only calibrates.
        lr: peak learning rate.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        weight_decay: on weights.
        distill: weight of the distance to the dense model; the loss on labels weighs the rest.
        temperature: softens both sides of the distillation.
        learn_scales: train the scales too (arXiv 1902.08153).
        held_out: the share of the training samples that judges, at most 1,024 of them.
        freeze: the share of epochs after which scales are no longer measured again.
        sensitivity: tell by weight how much rounding in its layer raises the loss, dearest first.
        recover: leave the layers in floating point whose rounding costs most, to win back so many
            points of agreement with the unrounded program; 0 for none.

    """

    observer: Method = "mse"
    samples: int = 512
    batch_size: int = 64
    search_weights: bool = False
    rounding: Literal["nearest", "adaptive"] = "nearest"
    bias_correction: bool = True
    epochs: int = 0
    lr: float = 0.002
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    learn_scales: bool = False
    held_out: float = 0.05
    freeze: float = 0.5
    sensitivity: bool = False
    recover: float = 0.0

    name: ClassVar[str] = "train-quantized"
    needs: ClassVar[Facts] = frozenset({OBSERVED})
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    gives: ClassVar[Facts] = frozenset({CALIBRATED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Calibrate and train; changes counts fake-quantisers."""
        details: dict[str, Any] = {}
        if self.recover:
            details |= self._recover(program, context)
        count, found = self._calibrate(program, context)
        details |= found
        if self.epochs > 0:
            trained = self._train(program, context)
            trained["notes"] = [*details.get("notes", []), *trained.get("notes", [])]
            details |= trained
        if self.sensitivity and not self.recover:
            costs = rounding_costs(program, context, self.samples, self.batch_size)
            details |= {"sensitivity": costs, "tables": [_table(costs)]}
        program.put(CALIBRATED, program.get(OBSERVED))
        return Outcome(count, details=details)

    def _calibrate(self, program: Program, context: Context) -> tuple[int, dict[str, Any]]:
        """Turn observers into fake-quantisers; returns how many, and what else was done."""
        found = sites(program)
        observers = walk(program, context, found, self.observer, self.samples, self.batch_size)
        count = settle(program, found, observers, self.observer, search_weights=self.search_weights)
        details: dict[str, Any] = {}
        exact = program.copy(share=True)  # keeps the tensors that are replaced from here on
        if self.rounding == "adaptive":
            size = self.samples, self.batch_size
            details |= told(round_weights(program, context, *size, means=self.bias_correction))
        if self.bias_correction:
            details["corrected"] = correct_biases(program, exact, context, self.samples)
        return count, details

    def _recover(self, program: Program, context: Context) -> dict[str, Any]:
        def calibrate(trial: Program) -> None:
            self._calibrate(trial, context)

        size = self.samples, self.batch_size
        found = recover(program, context, self.recover, calibrate, *size)
        note = f"rounding changes {found.gaps[0]:.2f} % of predictions"
        if found.weights:
            left = ", ".join(found.weights)
            note += f", and {found.gaps[-1]:.2f} % with these layers in floating point: {left}"
        if found.gaps[0] - found.gaps[-1] < min(self.recover, found.gaps[0]):
            note += f"; that is less than the {self.recover:g} points asked for"
        return {
            "sensitivity": dict(found.costs),
            "floats": list(found.weights),
            "disagreement": list(found.gaps),
            "tables": [_table(found.costs, found.weights)],
            "notes": [note],
        }

    def _train(self, program: Program, context: Context) -> dict[str, Any]:
        schedule = Schedule(
            self.epochs, self.lr, self.optimizer, weight_decay=self.weight_decay,
            batch_size=self.batch_size, distill=self.distill, temperature=self.temperature,
        )  # fmt: skip

        def measure(epoch: int) -> None:
            if 0 < epoch <= self.freeze * self.epochs:
                remeasure(program, context, self.observer, self.samples, self.batch_size)

        def learn(part: Context) -> tuple[Epoch, ...]:
            if not self.learn_scales:
                return train(program, part, schedule, on_epoch=measure)
            with learned_scales(program):
                return train(program, part, schedule)

        return guarded(program, context, schedule, self.held_out, learn).told()


def _table(costs: Mapping[str, float], floats: Collection[str] = ()) -> dict[str, Any]:
    """Rounding errors by layer, for the report."""
    whole = sum(costs.values()) or 1.0
    rows = [
        [name, f"{cost:.2e}", f"{100 * cost / whole:.1f} %", "FP32" if name in floats else "INT8"]
        for name, cost in costs.items()
    ]
    columns = ["layer", "rise of the loss", "share", "runs as"]
    return {"title": "What rounding costs, to second order", "columns": columns, "rows": rows}
