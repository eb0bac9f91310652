"""What a measurement of sensitivity is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fxprune.calibration.stream import calibration_stream
from fxprune.data.batches import Batch
from fxprune.errors import InputError
from fxprune.graph.cost import activation_bytes
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.values import check_choice
from fxprune.sensitivity.model import LabelSource, Objective, Precision
from fxprune.sensitivity.running_stats import StoppingRule
from fxprune.sensitivity.units import UnitLayout

Criterion = Literal[
    "hessian-trace", "gauss-newton-trace", "gauss-newton", "output-shift", "fisher", "taylor",
    "magnitude-l1", "magnitude-l2", "bn-scale", "activation", "random",
]  # fmt: skip
Estimator = Literal["auto", "weights", "outputs", "exact"]
Negative = Literal["abs", "clamp"]
Details = dict[str, float | int | str]


@dataclass(frozen=True)
class SensitivitySettings:
    """How to measure sensitivity.

    Attributes:
        criterion: which estimate of the rise in loss.
        probes: largest number of random probes for a Hessian trace.
        min_probes: number of probes before the first check whether the ranking has settled.
        cut: fraction of units, least sensitive first, whose selection must settle.
        tolerance: fraction of them that may be wrong; 0 uses all probes.
        samples: how many calibration samples, drawn at random.
        batch_size: of the streamed batches; each batch has probes of its own.
        precision: of the model's arithmetic.
        labels: where the loss gets its labels.
        estimator: what trace probes perturb, or ``exact`` for none; ``auto`` takes the best that
            applies.
        negative: what becomes of negative traces: their size counts, or they become zero.
        output_probes: random vectors per batch for ``gauss-newton`` and ``output-shift``; exact if
            there are no more outputs than this. 0 chooses by the number of outputs.
        memory_gib: how much the activations of a batch may take; batches shrink to fit.

    """

    criterion: Criterion = "output-shift"
    probes: int = 300
    min_probes: int = 16
    cut: float = 0.5
    tolerance: float = 0.01
    precision: Precision = "fp32"
    samples: int = 256
    batch_size: int = 64
    memory_gib: float = 2.0
    labels: LabelSource = "data"
    estimator: Estimator = "auto"
    negative: Negative = "abs"
    output_probes: int = 0

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, Any, object], ...] = (
            ("criterion", Criterion, self.criterion),
            ("precision", Precision, self.precision),
            ("labels", LabelSource, self.labels),
            ("estimator", Estimator, self.estimator),
            ("negative", Negative, self.negative),
        )
        for name, kind, value in choices:
            check_choice(name, value, kind)
        if min(self.samples, self.batch_size, self.probes) < 1:
            raise InputError("samples, batch-size and probes must be at least 1")
        if self.output_probes < 0:
            raise InputError("output-probes must be at least 1, or 0 to choose automatically")
        if self.memory_gib <= 0:
            raise InputError(f"memory-gib is {self.memory_gib:g}; it must be greater than 0")

    @property
    def rule(self) -> StoppingRule:
        """When to stop probing."""
        return StoppingRule(self.cut, self.tolerance, self.min_probes, self.probes)


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of all units in the order of the layout, with what is known about them."""

    scores: Tensor
    errors: Tensor | None = None
    details: Mapping[str, float | int | str] | None = None
    skipped: Mapping[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be measured: a copy of the program, on its device, and how."""

    program: Program
    layout: UnitLayout
    settings: SensitivitySettings
    context: Context

    def batches(self, at_most: int | None = None) -> Iterator[Batch]:
        """Yield the calibration batches, of ``at_most`` so many samples, the same every time."""
        room = self.settings.memory_gib * 2**30 / activation_bytes(self.program)
        size = min(self.settings.batch_size, max(1, int(room)), at_most or self.settings.batch_size)
        yield from calibration_stream(self.program, self.context, self.settings.samples, size)

    def objective(self) -> Objective:
        """Return the loss with its labels."""
        return Objective(self.context.loss, self.settings.labels)
