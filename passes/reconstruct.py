"""Re-fit weights so that values inside the program stay close to those of the dense model.

Before:
    conv2d: 8x12x32x32 = conv2d(x, weight, bias)     # what removal left of the dense layer

After:
    conv2d: 8x12x32x32 = conv2d(x, weight', bias')

    weight', bias' = argmin  sum |y(weight', bias'; x) - y_dense|^2 + ridge |weight' - weight|^2

Convolutions and linear layers are re-fitted one after the other, in graph order; ``x`` is what the
layers already re-fitted compute from the calibration samples. ``y`` is the value at the end of the
layer's affine tail, behind batch norms and sums, if this value remains of the dense value
``y_dense``: so a layer also compensates for what was lost on the other side of a shortcut. The
solution is exact, from second moments. Held-out samples decide, output by output, how far to move
towards it; a change that does not reduce their error is rejected. No labels are needed. Masked
weights stay zero.

``lookahead=K`` adds a second round: Newton's method with conjugate gradients (SNOWS, arXiv
2411.18376) changes each layer so that the values of the next K operators match the dense program
too, while all other layers stay as the first round left them.

Layers whose values have no counterpart in the dense program are skipped and, without lookahead,
so are transposed convolutions and outputs with more than 8,192 weights. Weights that are computed,
or that operators other than layers read, do not change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from fxprune.calibration.layer_matrix import layers
from fxprune.calibration.running import placed
from fxprune.calibration.stream import calibration_stream
from fxprune.errors import InputError
from fxprune.graph.cost import activation_bytes, cost
from fxprune.graph.facts import MASKS, PLAN, REMOVED
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.pipeline.patterns import names_of_tensor, select_any
from fxprune.reconstruction.driver import GIB, Reconstruction
from fxprune.reconstruction.incremental_run import Store
from fxprune.reconstruction.layer_solvers import SolverSettings
from fxprune.reconstruction.refit import LayerResult

# Largest size of all values of a batch. Beyond it, fresh memory at every operator costs more time
# than smaller batches do: a forward pass of MobileNetV2 takes 75 ms of processor time per image in
# batches of 100, 45 in batches of 32, and 24 in batches of 16.
FAST_BATCH_BYTES = 2**30
TRIAL_SAMPLES = 256  # calibration samples when a plan is tried
AUTO_LOOKAHEAD = 12  # operators that ``auto`` looks ahead
# ``auto`` looks ahead if a run over all samples takes at most so many multiply-accumulates: about
# four minutes of processor time in all, at 2.7 ns each.
AUTO_LOOKAHEAD_MAX_MACS = 1e11


@dataclass(frozen=True)
class Reconstruct(SolverSettings, Pass):
    """Match values to those of the dense program, layer by layer.

    Attributes:
        samples: largest number of calibration samples, drawn at random.
        batch_size: samples per batch.
        ridge: strength of the pull towards the current weights, relative to the mean square of
            their inputs.
        held_out: fraction of the samples that judges changes and is not fitted.
        lookahead: number of operators beyond each layer to match in a second round, by Newton's
            method; 0 disables it, ``auto`` is 12 if that takes minutes and 0 otherwise.
        rounds: number of times to look ahead from every layer.
        curvature: second derivatives of the residuals only, or of the whole loss as in the paper.
        steps: largest number of Newton steps per layer.
        cg_steps: largest number of conjugate-gradient steps per Newton step.
        damping: term added to the curvature, relative to the curvature along the gradient.
        tolerance: residual at which conjugate gradients stop, relative to the gradient.
        solver: ``own``, or ``paper`` for the published method: no first round, later layers are
            dense, only weights change, sums of squares are unweighted, conjugate gradients are not
            preconditioned, and every step takes gradient, curvature and line search from a batch
            of its own.
        memory_gib: memory for activations, in GiB. Half holds activations in transit, with the rest
            of them on disk; half is for computing, and batches shrink to fit.
        only: name patterns of the weights or modules to re-fit; empty for all.

    """

    samples: int = 1024
    batch_size: int = 128
    lookahead: int | str = 0
    rounds: int = 1
    memory_gib: float = 4.0
    only: tuple[str, ...] = ()

    name: ClassVar[str] = "reconstruct"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS, PLAN})
    repeats: ClassVar[str | None] = "the weights are solved for again, from where they are"

    def __post_init__(self) -> None:
        if isinstance(self.lookahead, str) and self.lookahead != "auto":
            raise InputError(f"lookahead is {self.lookahead}; it must be auto or a whole number")

    def for_trials(self) -> Reconstruct:
        """Re-fit layers without lookahead, on few samples."""
        return replace(self, samples=min(self.samples, TRIAL_SAMPLES), lookahead=0, solver="own")

    def run(self, program: Program, context: Context) -> Outcome:
        """Re-fit; changes counts layers whose error fell."""
        if context.dense is None:
            raise InputError("reconstruct needs the dense model; set Context.dense")
        if self.solver == "paper":
            self._check(program)
        program.eval()
        first = next(iter(context.dense.graph_module.parameters()), None)
        there = first is None or first.device == torch.empty(0, device=context.device).device
        dense = context.dense.copy(share=there).to(context.device).eval()
        operations, notes = self._ahead(dense, context)
        details: dict[str, Any] = {}
        changed: set[str] = set()
        with placed(program, context.device), torch.no_grad():
            ahead = [operations] * self.rounds * (operations > 0)
            for lookahead in ahead if self.solver == "paper" else (0, *ahead):
                results, skips, report = self._round(program, dense, context, lookahead)
                changed |= {layer.layer for layer in results if layer.after < layer.before}
                report["layers"] = [asdict(layer) for layer in results]
                if lookahead:
                    details.setdefault("lookahead", []).append(report)
                else:
                    details |= report
        return Outcome(len(changed), skips, details, tuple(notes))

    def _ahead(self, dense: Program, context: Context) -> tuple[int, list[str]]:
        """Return how many operations to look ahead, and a note if ``auto`` finds it too slow."""
        if not isinstance(self.lookahead, str):
            return self.lookahead, []
        samples = min(self.samples, len(context.samples.calibration))
        if samples * cost(dense).macs <= AUTO_LOOKAHEAD_MAX_MACS:
            return AUTO_LOOKAHEAD, []
        return 0, [
            "reconstruct re-fitted every layer but did not look ahead, because that would take "
            f"long; to look ahead, write reconstruct{{lookahead={AUTO_LOOKAHEAD}}} in your own "
            "pipeline"
        ]

    def _check(self, program: Program) -> None:
        if not self.lookahead:
            raise InputError("solver=paper needs a lookahead; give, for example, lookahead=20")
        removed = program.facts.get(REMOVED.name)
        if removed is not None and any(removed.kept.values()):
            raise InputError(
                "solver=paper needs masks: after removal, the dense later layers do not fit"
            )

    def _round(
        self, program: Program, dense: Program, context: Context, lookahead: int
    ) -> tuple[list[LayerResult], tuple[Skip, ...], dict[str, Any]]:
        """Re-fit every layer once; return results, skips and details of the report."""
        half = int(self.memory_gib * GIB / 2)
        chosen = None
        if self.only:
            names = {layer.weight: names_of_tensor(layer.weight) for layer in layers(program)}
            chosen = select_any(self.only, names, "reconstruct{only}", "layer").__contains__
        # Curvature needs many samples; moments do not, so batches are those that run fastest.
        fast = max(FAST_BATCH_BYTES // activation_bytes(program), 1)
        with Store(half) as store:
            task = Reconstruction(
                program, dense, self, store, context.device, chosen, lookahead=lookahead
            )
            size = min(
                self.batch_size, task.max_batch(half), self.batch_size if lookahead else fast
            )
            total = 0
            if len(task):
                stream = calibration_stream(program, context, self.samples, size)
                size, total = stream.batch_size, stream.total
                for batch in stream:
                    task.enter(batch.inputs)
            text = f"looking {lookahead} operators ahead" if lookahead else "reconstructing"
            work = context.progress.track(task.run(), text, len(task))
            results = [layer for layer in work if layer is not None]
        report = {
            "samples": total,
            "batch_size": size,
            "activations_gib": round(store.peak / GIB, 3),
            "spilled_gib": round(store.spilled / GIB, 3),
        }
        skips = tuple(Skip(layer.node, layer.reason) for layer in task.declined)
        return results, skips, report
