"""Re-fit the weights so that values inside the program stay those of the dense one.

Before:
    conv2d: 8x12x32x32 = conv2d(x, weight, bias)     # of the dense model, less what was removed

After:
    conv2d: 8x12x32x32 = conv2d(x, weight', bias')

    weight', bias' = argmin  sum |y(weight', bias'; x) - y_dense|^2 + ridge |weight' - weight|^2

Convolutions and linear layers change one after the other in graph order; ``x`` is what the layers
already changed make of the calibration samples. ``y`` is the value at the end of the layer's affine
tail, past batch norms and sums, where it is what is left of the dense value ``y_dense``: so a layer
also makes good what was lost on the other side of a shortcut. The solution is exact, from second
moments; samples that are held out tell how far to go towards it, output by output, and a change
that does not bring them nearer is not made. Labels are not needed. Masked weights stay zero.

Declines transposed convolutions, and layers whose values have no counterpart in the dense program;
computed weights, and those with readers other than layers, are left alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from fxprune.activations import Store
from fxprune.context import Context
from fxprune.data import batches
from fxprune.errors import InputError
from fxprune.evaluate import fixed_batch
from fxprune.facts import MASKS, REMOVED
from fxprune.pipeline import Facts, Outcome, Pass, Skip
from fxprune.program import Program
from fxprune.reconstruction import GIB, Reconstruction, Settings
from fxprune.training import placed


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Bring values back to those of the dense program, layer by layer.

    Attributes:
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per batch.
        ridge: how strongly weights hold on to what they are, relative to the mean square of what
            they multiply.
        held_out: the share of the samples that judges changes and does not make them.
        memory_gib: activations kept in memory at most; the rest lies on disk.

    """

    samples: int = 1024
    batch_size: int = 128
    ridge: float = 1e-3
    held_out: float = 0.2
    memory_gib: float = 2.0

    name: ClassVar[str] = "reconstruct"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})

    def run(self, program: Program, context: Context) -> Outcome:
        """Re-fit; changes counts layers."""
        if context.dense is None:
            raise InputError("reconstruct needs the dense model; set Context.dense")
        program.eval()
        dense = context.dense.copy().eval().to(context.device)
        settings = Settings(self.ridge, self.held_out, int(self.memory_gib * GIB))
        with placed(program, context.device), torch.no_grad(), Store(settings.memory) as store:
            task = Reconstruction(program, dense, settings, store, context.device)
            total = self._enter(task, context, fixed_batch(program)) if len(task) else 0
            work = context.progress.track(task.mend(), "reconstructing", len(task))
            mended = [layer for layer in work if layer is not None]
        better = [layer for layer in mended if layer.after < layer.before]
        skips = tuple(Skip(layer.node, layer.reason) for layer in task.declined)
        details = {
            "samples": total,
            "activations_gib": round(store.peak / GIB, 3),
            "spilled_gib": round(store.spilled / GIB, 3),
            "layers": [asdict(layer) for layer in mended],
        }
        return Outcome(len(better), skips, details)

    def _enter(self, task: Reconstruction, context: Context, fixed: int | None) -> int:
        """Hand over the samples; returns how many."""
        samples = context.samples.calibration
        total, size = min(self.samples, len(samples)), fixed or self.batch_size
        total = max(total - total % size, size) if fixed else total
        for batch in batches(samples, size, seed=context.seed, limit=total, device=context.device):
            task.enter(batch.inputs)
        return total
