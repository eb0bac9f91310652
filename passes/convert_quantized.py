"""Store weights as INT8 and compute with quantise/dequantise pairs.

Before:
    fake_quantize: 4x3x3x3 = fxprune.fake_quantize(<weight 4x3x3x3>, scale, zero, -127, 127, 0)
    conv2d: 1x4x6x6 = conv2d(x, fake_quantize, <bias 4>)

After:
    dequantize: 4x3x3x3 = fxprune.dequantize(<weight int8 4x3x3x3>, scale, zero, 0)
    dequantize_1: 4 = fxprune.dequantize(<bias int32 4>, sums, zeros, 0)
    conv2d: 1x4x6x6 = conv2d(x, dequantize, dequantize_1)

Biases become INT32 with the scale ``input scale * weight scale``, the unit of the layer's sums.
Views, pads and other operators that only move data work directly on INT8 values. The result equals
the fake-quantised program to within one quantisation step, and exports to ONNX as integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxprune.graph.custom_ops import FAKE_QUANTIZE
from fxprune.graph.facts import CALIBRATED, CONVERTED, MASKS, REMOVED
from fxprune.graph.program import Program
from fxprune.graph.surgery import drop_unused
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass
from fxprune.quantization.conversion import convert


@dataclass(frozen=True)
class ConvertQuantized(Pass):
    """Convert fake-quantisers to INT8 weights and quantise/dequantise pairs."""

    name: ClassVar[str] = "convert-quantized"
    needs: ClassVar[Facts] = frozenset({CALIBRATED})
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    gives: ClassVar[Facts] = frozenset({CONVERTED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Convert; changes counts fake-quantisers."""
        count = convert(program)
        drop_unused(program)
        program.put(CONVERTED, program.get(CALIBRATED))
        return Outcome(count)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Every fake-quantizer was converted."""
        remaining = [node.name for node in program.graph.nodes if node.target is FAKE_QUANTIZE]
        yield "no fake-quantizer remains", not remaining
