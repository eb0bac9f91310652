"""Find the scales of observed values, and train the weights that will be rounded.

Before:
    observe: 8x16x32x32 = fxprune.observe(relu, relu, 0, 255, False, -1)

After:
    fake_quantize: 8x16x32x32 = fxprune.fake_quantize(relu, <quantizers.relu.scale scalar>,
        <quantizers.relu.zero_point uint8 scalar>, 0, 255, -1)

Calibration runs samples through the program in floating point; observers take the range of what
they see, and weights that of their largest value per output channel. Fake-quantisers then round
to what codes can tell. Fails where there is no data to calibrate on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.context import Context
from fxprune.facts import CALIBRATED, MASKS, OBSERVED, REMOVED
from fxprune.pipeline import Facts, Outcome, Pass
from fxprune.program import Program
from fxprune.quantization import settle, sites, walk
from fxprune.quantization_observers import Method


@dataclass(frozen=True)
class TrainQuantized(Pass):
    """Calibrate observers and turn them into fake-quantisers.

    Attributes:
        observer: the range of activations: of all values, averaged over batches, without the
            outermost ten-thousandth, of least squared error, or of least divergence.
        samples: how many calibration samples at most, drawn at random.
        batch_size: samples per step.
        search_weights: take the weight scales of least squared error.

    """

    observer: Method = "mse"
    samples: int = 512
    batch_size: int = 64
    search_weights: bool = False

    name: ClassVar[str] = "train-quantized"
    needs: ClassVar[Facts] = frozenset({OBSERVED})
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    gives: ClassVar[Facts] = frozenset({CALIBRATED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Calibrate; changes counts fake-quantisers."""
        found = sites(program)
        observers = walk(program, context, found, self.observer, self.samples, self.batch_size)
        count = settle(program, found, observers, self.observer, search_weights=self.search_weights)
        program.put(CALIBRATED, program.get(OBSERVED))
        return Outcome(count)
