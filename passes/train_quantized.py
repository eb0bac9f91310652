"""Calibrate the scales of quantisation and train through the rounding.

Before:
    observe: 8x16x32x32 = fxprune.observe(relu, relu, 0, 255, False, -1)

After:
    fake_quantize: 8x16x32x32 = fxprune.fake_quantize(relu, <quantizers.relu.scale scalar>,
        <quantizers.relu.zero_point uint8 scalar>, 0, 255, -1)

Calibration runs samples through the program in FP32. Observers measure the range of activations;
the range of weights is the largest absolute value per output channel. Fake-quantisers then round
values to what INT8 can represent (weights to the nearest value, or adaptively), and biases are
corrected for the shift that rounding causes in the means of layers. With ``recover``, the layers
whose rounding costs most stay in FP32.

With ``epochs``, the weights are trained through the rounding with a straight-through gradient and
with the dense model as a teacher (see finetune). Scales are measured again before each epoch in the
first part of training (``freeze``), or are trained with the weights (``learn_scales``). Masked
weights stay zero, and held-out samples decide which weights to keep (see finetune). Raises an error
if there is no data to calibrate or train on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fxprune.graph.facts import CALIBRATED, MASKS, OBSERVED, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, ReportTable
from fxprune.quantization.bias import correct_biases
from fxprune.quantization.fake_quantizers import calibrate, freeze, observer_sites, remeasure
from fxprune.quantization.layer_costs import rounding_costs
from fxprune.quantization.observers import Method
from fxprune.quantization.recovery import recover
from fxprune.quantization.rounding import round_weights, to_details
from fxprune.quantization.scales import learned_scales
from fxprune.training.guarding import Guarded, guarded
from fxprune.training.loop import Epoch, Schedule, train


@dataclass(frozen=True)
class TrainQuantized(Pass):
    """Calibrate observers, turn them into fake-quantisers, and train.

    Attributes:
        observer: how the range of activations is chosen: all values (minmax), their running
            average over batches, without the outer 0.01 %, or with the least squared error or
            divergence after rounding.
        samples: largest number of calibration samples, drawn at random.
        batch_size: samples per step.
        search_weights: choose the scales of weights that minimise the squared error of rounding.
        rounding: round weights to the nearest value, or up or down so that the output of the layer
            moves least on calibration samples (arXiv 2004.10568, 2210.17323).
        bias_correction: correct biases for the shift in the means of layers after calibration.
        epochs: number of passes over the training data; 0 only calibrates.
        lr: peak learning rate.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        weight_decay: weight decay for weights.
        distill: weight of the distance to the dense model, between 0 and 1; the loss on labels has
            the rest.
        temperature: softmax temperature of both models in distillation.
        learn_scales: train the scales too (arXiv 1902.08153).
        held_out: fraction of the training samples (at most 1,024) that selects the weights to keep.
        freeze: fraction of the epochs during which scales are measured again.
        sensitivity: report for each weight by how much rounding in its layer raises the loss.
        recover: keep in FP32 the layers whose rounding costs most, until so many percentage points
            of predictions agree again with the program before rounding; 0 disables this.

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
        parts = [self._recover(program, context)] if self.recover else []
        count, details = self._calibrate(program, context)
        parts.append(Outcome(details=details))
        if self.epochs > 0:
            trained = self._train(program, context)
            parts.append(Outcome(details=trained.to_details(), notes=trained.notes))
        if self.sensitivity and not self.recover:
            costs = rounding_costs(program, context, self.samples, self.batch_size)
            parts.append(Outcome(details={"sensitivity": costs}, tables=(_table(costs),)))
        program.put(CALIBRATED, program.get(OBSERVED))
        return Outcome(
            count,
            details={name: value for part in parts for name, value in part.details.items()},
            notes=tuple(note for part in parts for note in part.notes),
            tables=tuple(table for part in parts for table in part.tables),
        )

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Every observer became a fake-quantizer."""
        yield "no observer remains", not observer_sites(program)

    def _calibrate(self, program: Program, context: Context) -> tuple[int, dict[str, Any]]:
        """Turn observers into fake-quantisers; return their number and details of the report."""
        found = observer_sites(program)
        size = self.samples, self.batch_size
        observers = calibrate(program, context, found, self.observer, *size)
        count = freeze(program, found, observers, self.observer, search_weights=self.search_weights)
        details: dict[str, Any] = {}
        exact = program.copy(share=True)  # has the unrounded tensors, which are replaced below
        if self.rounding == "adaptive":
            rounded = round_weights(program, context, *size, means=self.bias_correction)
            details |= to_details(rounded)
        if self.bias_correction:
            details["corrected"] = correct_biases(program, exact, context, self.samples)
        return count, details

    def _recover(self, program: Program, context: Context) -> Outcome:
        def prepare(trial: Program) -> None:
            self._calibrate(trial, context)

        size = self.samples, self.batch_size
        found = recover(program, context, self.recover, prepare, *size)
        note = f"rounding changes {found.gaps[0]:.2f} % of predictions"
        if found.weights:
            names = ", ".join(found.weights)
            note += f", and {found.gaps[-1]:.2f} % with these layers in FP32: {names}"
        if found.gaps[0] - found.gaps[-1] < min(self.recover, found.gaps[0]):
            note += f"; that recovers less than the {self.recover:g} points requested"
        details = {
            "sensitivity": dict(found.costs),
            "fp32": list(found.weights),
            "disagreement": list(found.gaps),
        }
        return Outcome(0, (), details, (note,), (_table(found.costs, found.weights),))

    def _train(self, program: Program, context: Context) -> Guarded:
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

        return guarded(program, context, schedule, self.held_out, learn)


def _table(costs: Mapping[str, float], fp32: Collection[str] = ()) -> ReportTable:
    """Rounding errors by layer, for the report."""
    whole = sum(costs.values()) or 1.0
    rows = [
        (name, f"{cost:.2e}", f"{100 * cost / whole:.1f} %", "FP32" if name in fp32 else "INT8")
        for name, cost in costs.items()
    ]
    columns = "layer", "rise in loss", "share", "runs as"
    return ReportTable("Loss caused by rounding, to second order", columns, tuple(rows))
