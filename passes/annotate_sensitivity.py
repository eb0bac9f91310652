"""Score every removable unit by the rise in loss when it is removed.

Before:
    get_attr conv1.weight

After:
    get_attr conv1.weight      meta["fxprune.sensitivity"] = {0: one score per output channel}

The pass also records the fact ``sensitivity``: for each group, one score per unit and, where the
score is an estimate, its standard error. For example, the score ``hessian-trace`` of a unit ``u``
is the relative Hessian trace of HAP (arXiv 2101.08940), ``Tr(H_uu) / (2 |u|) ||w_u||^2``, over all
weights that are removed with the unit; it is estimated with random probes, which stop once the
ranking at the cut has settled. The default, ``output-shift``, needs no labels. All criteria are
compared in ``docs/sensitivity.md``.

``gauss-newton`` needs cross-entropy, or a squared error, on one output of any shape. For any other
loss ``fisher`` replaces it; without labels, or for models with several outputs, ``output-shift``
does; the report says so. A group that a criterion cannot score (``bn-scale`` without a batch norm)
gets no scores and is reported as skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fxprune.graph.facts import SENSITIVITY, Preference
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.sensitivity.scores import measure
from fxprune.sensitivity.task import SensitivitySettings
from fxprune.structure.groups import find_groups

META = "fxprune.sensitivity"


@dataclass(frozen=True)
class AnnotateSensitivity(SensitivitySettings, Pass):
    """Score every removable unit.

    Attributes:
        criterion: how a unit's importance is measured; see docs/sensitivity.md.
        probes: largest number of random probes for a Hessian trace.
        min_probes: number of probes before the first check whether the ranking has settled.
        cut: fraction of units, least sensitive first, whose selection must settle before the
            probes stop.
        tolerance: fraction of the selected units that may be wrong when the probes stop; 0 uses
            all probes.
        precision: number format of the model's arithmetic; sums always use at least FP32.
        samples: number of calibration samples.
        batch_size: largest number of samples per batch.
        memory_gib: memory for the activations of one batch, in GiB; batches shrink to fit.
        labels: where labels come from: the data, the model's own predictions, or random draws
            from its predicted probabilities.
        estimator: what the probes perturb: weights or outputs; exact uses no probes; auto takes
            the most accurate one that applies.
        negative: use the absolute value of negative traces, or clamp them to 0.
        output_probes: random vectors per batch for gauss-newton and output-shift; 0 is exact for
            up to 16 outputs, and uses 4 vectors for more.
        attention: units of attention are whole heads, or positions inside every head.

    """

    attention: Preference = "heads"

    name: ClassVar[str] = "annotate-sensitivity"
    acts: ClassVar[bool] = False
    gives: ClassVar[Facts] = frozenset({SENSITIVITY})

    def __post_init__(self) -> None:
        super().__post_init__()  # of the settings; the class checks the choices of a pass first

    def run(self, program: Program, context: Context) -> Outcome:
        """Measure, record the fact, and annotate the parameter nodes."""
        groups = find_groups(program, self.attention)
        sensitivity, layout, skipped = measure(program, groups, self, context)
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
        return Outcome(0, skips, details, (str(note),) if note else ())
