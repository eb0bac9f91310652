"""Insert observers where ONNX Runtime will compute in INT8.

Before:
    conv2d: 1x4x6x6 = conv2d(x, <weight 4x3x3x3>, <bias 4>)
    relu: 1x4x6x6 = relu(conv2d)

After:
    observe: 1x3x8x8 = fxprune.observe(x, x, 0, 255, False, -1)
    observe_1: 4x3x3x3 = fxprune.observe(<weight 4x3x3x3>, weight, -127, 127, True, 0)
    conv2d: 1x4x6x6 = conv2d(observe, observe_1, <bias 4>)
    relu: 1x4x6x6 = relu(conv2d)
    observe_2: 1x4x6x6 = fxprune.observe(relu, relu, 0, 255, False, -1)

Observers compute nothing; they state the number format to come: unsigned with one scale for
activations, signed with one scale per output channel for weights. Their places follow from a table
of what ONNX Runtime fuses: the inputs and outputs of convolutions (the output after a ReLU, or
after a clamp from zero), the inputs of linear layers, both inputs and the output of additions of
such values, and pooling. Operators that only move values (views, slices, pads, concatenations,
maxima) keep their quantisation.

These layers stay in FP32: those that a pattern of ``fp32`` names, depthwise convolutions with
``depthwise=false``, those that INT8 does not make faster by times measured in ONNX Runtime on this
host (unless ``measure=false``), and those whose weight is computed or has other readers. Run
fold-batchnorm first: a convolution that is followed by a batch norm is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.graph.custom_ops import DEQUANTIZE, FAKE_QUANTIZE
from fxprune.graph.decompose import spell_attention, spell_means
from fxprune.graph.facts import MASKS, OBSERVED, REMOVED, Quantized
from fxprune.graph.node_args import packet_of
from fxprune.graph.program import Program
from fxprune.latency.table import Table
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, ReportTable, Skip
from fxprune.pipeline.patterns import names_of_tensor, select_any
from fxprune.quantization.activations import decompose, element_wise
from fxprune.quantization.fake_quantizers import observe, observer_sites, sums_overflow
from fxprune.quantization.patterns import (
    has_weight,
    is_depthwise,
    is_product,
    place,
    weight_name,
)
from fxprune.quantization.timing import Division, LayerTiming, divide
from fxprune.quantization.transposed import spell_transposed

aten = torch.ops.aten
REDUCED_NOTE = (
    "the range of weights is reduced so that two products fit 16 bits, as processors without 8-bit "
    "dot products need"
)
NONE_GAINS_NOTE = "no layer was faster in INT8 on this host; all were converted anyway"


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Insert observers around the layers that will run in INT8, and between them.

    Attributes:
        fp32: layers to keep in FP32, as patterns of the names of weights or nodes.
        depthwise: quantise depthwise convolutions too; with false they stay in FP32, but the
            conversions around them cost more than this saves on every processor measured so far.
        reduce_range: limit weights so that sums of two products fit 16 bits, as processors without
            8-bit dot products need (default: true on such a processor).
        attention: quantise products of two activations too; softmax stays in FP32.
        measure: keep in FP32 the layers that INT8 does not make faster, including conversions
            around them, by the latency table of this host, which measures what it lacks; where no
            layer is faster, all are converted, and a note says so.

    """

    fp32: tuple[str, ...] = ()
    depthwise: bool = True
    reduce_range: bool | None = None
    attention: bool = False
    measure: bool = True

    name: ClassVar[str] = "insert-observers"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})
    gives: ClassVar[Facts] = frozenset({OBSERVED})

    def run(self, program: Program, context: Context) -> Outcome:
        """Insert; changes counts observers, and nodes that were decomposed for them."""
        present = {DEQUANTIZE, FAKE_QUANTIZE}
        if observer_sites(program) or any(node.target in present for node in program.graph.nodes):
            return Outcome()
        spelled = spell_transposed(program)
        skips: list[Skip] = []
        fp32 = self._fp32(program)
        chosen: set[fx.Node] = set()
        for node in _layers(program):
            if reason := self._obstacle(program, node, node in fp32):
                skips.append(Skip(node.name, reason))
            else:
                chosen.add(node)
        division = Division({}, frozenset())
        if self.measure and chosen:
            table, wanted = Table.of(context), chosen.union(element_wise(program))
            division = divide(program, wanted, table, context.progress)
        timed = division.layers
        tables = (_times(timed),) if timed else ()
        gaining = {node for node, timing in timed.items() if timing.quantized}
        none_gains = bool(timed) and not gaining & chosen
        slow = set() if none_gains else (chosen & timed.keys()) - gaining
        skips += [
            Skip(node.name, _slowness(timed[node])) for node in program.graph.nodes if node in slow
        ]
        if chosen:
            spelled += self._spell(program)
        alone = set() if none_gains else decompose(program, gaining - chosen)
        alone |= {node for node in program.graph.nodes if self.attention and is_product(node)}
        followers = frozenset() if none_gains else division.followers
        placement = place(program, followers | (chosen - slow) | alone)
        layers = {node.name: weight_name(node) for node in placement.layers}
        others = tuple(node.name for node in placement.others)
        reduced = sums_overflow() if self.reduce_range is None else self.reduce_range
        count = observe(program, placement)
        program.put(OBSERVED, Quantized(layers, others, reduced))
        details = {"layers": len(layers), "others": len(others)}
        notes = (REDUCED_NOTE,) * reduced + (NONE_GAINS_NOTE,) * none_gains
        return Outcome(count + spelled, tuple(skips), details, notes, tables)

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Layers that are to run in INT8 exist."""
        names = {node.name for node in program.graph.nodes}
        observed = program.facts.get(OBSERVED.name)
        layers = observed.layers if observed is not None else {}
        yield "every layer that is to run in INT8 exists", names >= set(layers)

    def _fp32(self, program: Program) -> frozenset[fx.Node]:
        """Return the layers that the option keeps in FP32; names are those of nodes and weights."""
        names: dict[fx.Node, tuple[str, ...]] = {node: (node.name,) for node in _layers(program)}
        for node in names:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                names[node] += names_of_tensor(weight_name(node))
        return select_any(self.fp32, names, "insert-observers{fp32}", "layer")

    def _spell(self, program: Program) -> int:
        """Decompose means and attention into operators with INT8 kernels; return their number."""
        spelled = spell_means(program) + (spell_attention(program) if self.attention else 0)
        if spelled:
            program.refresh()
        return spelled

    def _obstacle(self, program: Program, layer: fx.Node, named: bool) -> str | None:
        weight = layer.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        if named:
            return "the option fp32 keeps it in FP32"
        if is_depthwise(layer) and not self.depthwise:
            return "the option depthwise=false keeps it in FP32"
        if any(packet_of(user) is aten.batch_norm for user in layer.users):
            return "a batch norm follows it; run fold-batchnorm first"
        if not all(map(has_weight, program.readers(str(weight.target)))):
            return "operators other than layers read its weight"
        return None


def _layers(program: Program) -> list[fx.Node]:
    """The calls that could run in INT8 and have a weight."""
    return [node for node in program.graph.nodes if has_weight(node)]


def _slowness(timing: LayerTiming) -> str:
    gain = timing.fp32 / timing.int8 if timing.int8 else 0.0
    return (
        f"INT8 is not faster here: {timing.int8:.0f} us against {timing.fp32:.0f} us in FP32 "
        f"({gain:.2f}x), without conversions"
    )


def _times(timed: Mapping[fx.Node, LayerTiming]) -> ReportTable:
    """Make the table of measured layers for the report, those that gain least first."""
    order = sorted(timed, key=lambda node: timed[node].int8 - timed[node].fp32, reverse=True)
    rows = []
    for node in order:
        timing = timed[node]
        kept = "INT8" if timing.quantized else "FP32"
        name = weight_name(node) if has_weight(node) else node.name
        rows.append((name, f"{timing.int8:.1f}", f"{timing.fp32:.1f}", kept))
    columns = "operator", "us in INT8", "us in FP32", "runs as"
    return ReportTable("Operators timed in ONNX Runtime", columns, tuple(rows))
