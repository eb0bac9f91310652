"""Score every removable unit by how much the loss rises if it goes.

Before:
    get_attr conv1.weight

After:
    get_attr conv1.weight      meta["fxprune.sensitivity"] = {0: one score per output channel}

and the fact ``sensitivity``: by group, one score per unit and, where it is an estimate, its
standard error. The relative Hessian trace of HAP (arXiv 2101.08940) of a unit ``u`` is
``Tr(H_uu) / (2 |u|) ||w_u||^2`` over all weights that die with it; its probes stop once the ranking
at the cut has settled. Other criteria are scored in the same way and compared in
``docs/sensitivity.md``. The default, ``gauss-newton``, takes cross-entropy or a squared error on
one output of any shape. Where the loss is another, ``fisher`` stands in for it, or ``output-shift``
where there are no labels or the model has several outputs; the report says so. Groups that a
criterion cannot score (``bn-scale`` where there is no batch norm) are declined and get no scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fxprune.graph.facts import SENSITIVITY, Preference
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.sensitivity.model import LabelSource, Precision
from fxprune.sensitivity.running_stats import StoppingRule
from fxprune.sensitivity.scores import measure
from fxprune.sensitivity.task import Criterion, Estimator, Negative, Settings
from fxprune.structure.groups import find_groups

META = "fxprune.sensitivity"


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """Score every removable unit.

    Attributes:
        criterion: hessian-trace, gauss-newton-trace, gauss-newton, output-shift, fisher, taylor,
            magnitude-l1, magnitude-l2, bn-scale, activation or random.
        probes: how many probes a trace may take at most.
        min_probes: how many it takes before it first asks whether the ranking has settled.
        cut: the share of units, least sensitive first, whose membership has to settle.
        tolerance: the share of them that may be expected to be wrong; 0 takes all probes.
        precision: fp32, bf16 or fp16 for the model; sums are always in fp32 at least.
        samples: calibration samples.
        batch_size: of the batches that they are streamed in, at most.
        memory_gib: how much the activations of a batch may take; batches shrink to fit.
        labels: data, predicted or sampled.
        estimator: what trace probes perturb, weights or outputs; exact for none; auto for the best
            that applies.
        negative: abs or clamp; what becomes of negative traces.
        output_probes: random vectors per batch for gauss-newton and output-shift; 0 is exact for up
            to 16 outputs, and 4 beyond.
        attention: heads or head_dim; which factor of attention widths units are.

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
    attention: Preference = "heads"

    name: ClassVar[str] = "annotate-sensitivity"
    acts: ClassVar[bool] = False
    gives: ClassVar[Facts] = frozenset({SENSITIVITY})

    def run(self, program: Program, context: Context) -> Outcome:
        """Measure, record the fact, and annotate the parameter nodes."""
        settings = Settings(
            self.criterion, self.samples, self.batch_size, self.precision, self.labels,
            self.estimator, self.negative,
            StoppingRule(self.cut, self.tolerance, self.min_probes, self.probes),
            self.output_probes, self.memory_gib,
        )  # fmt: skip
        groups = find_groups(program, self.attention)
        sensitivity, layout, skipped = measure(program, groups, settings, context)
        program.put(SENSITIVITY, replace(sensitivity, attention=self.attention))
        scores = layout.joined(sensitivity.scores)
        spread = layout.spread(scores)
        for node in program.tensor_nodes():
            node.meta.pop(META, None)
            if str(node.target) in spread:
                node.meta[META] = spread[str(node.target)]
        skips = tuple(Skip(name, reason) for name, reason in skipped.items())
        details = {"criterion": self.criterion, **sensitivity.details}
        note = details.pop("note", None)
        return Outcome(0, skips, details | ({"notes": [note]} if note else {}))
