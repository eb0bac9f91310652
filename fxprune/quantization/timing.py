"""Which layers gain by INT8: the latency table has the times of each in both forms.

What leaving a layer in FP32 saves must pay for the conversions around it, unless its neighbours
stay in FP32 too. The cheapest division of a program is a minimum cut of its graph: the source's
side runs in INT8, the sink's in FP32; a layer's arcs to both cost its times, and an arc along a
value costs the conversion that a cut there would need.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from fxprune.graph.cost import batch_of
from fxprune.graph.node_args import packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of
from fxprune.latency.layer_config import FORMS, LayerConfig, conversion
from fxprune.latency.layers import Kind
from fxprune.latency.table import Table
from fxprune.latency.terms import config_of, configs_of_node
from fxprune.pipeline.progress import Tracker
from fxprune.quantization.patterns import is_move, pattern_of

aten = torch.ops.aten
# Activations that ONNX Runtime computes within the FP32 convolution before them, but for SiLU,
# which needs the channels in their usual order.
ACTIVATIONS: tuple[Kind, ...] = ("sigmoid", "silu", "hard-sigmoid", "hard-swish")
IMAGE_DIMENSIONS = 4


@dataclass(frozen=True)
class LayerTiming:
    """One layer's microseconds in INT8 and in FP32, and whether it is to run in INT8."""

    int8: float
    fp32: float
    quantized: bool


@dataclass(frozen=True)
class Conversions:
    """The microseconds of what stands between the forms of one value.

    Attributes:
        quantize: FP32 to INT8.
        dequantize: INT8 to FP32.
        transpose: INT8 kernels of images have the channels last; zero for other values.
        rearrange: FP32 convolutions of images have channels in blocks; zero for other values.

    """

    quantize: float
    dequantize: float
    transpose: float
    rearrange: float


def layer_timings(
    program: Program, layers: Collection[fx.Node], table: Table, progress: Tracker
) -> dict[fx.Node, LayerTiming]:
    """Time layers in both forms and divide them so that the whole takes least."""
    conversions = _conversions(program, table, progress)
    times = _times(program, layers, conversions, table, progress)
    graph = _network(program, times, conversions)
    quantized, _ = nx.minimum_cut(graph, "int8", "fp32")[1]
    return {node: LayerTiming(*pair, node.name in quantized) for node, pair in times.items()}


def least_us(program: Program, table: Table, progress: Tracker) -> float:
    """Return the microseconds of all layers of a program in the forms in which they take least.

    Layers that have weights run in either form, conversions counted; other layers, such as
    products of activations, run in FP32. Batch norms count as folded.
    """
    patterns = {node: pattern_of(node) for node in program.graph.nodes}
    layers = [node for node, one in patterns.items() if one is not None and one.weight is not None]
    conversions = _conversions(program, table, progress)
    times = _times(program, layers, conversions, table, progress)
    graph = _network(program, times, conversions)
    batch = batch_of(program)
    others = [
        config
        for node in program.graph.nodes
        if node not in times
        for config in configs_of_node(node, batch)
    ]
    table.fill(others, progress)
    return float(nx.minimum_cut_value(graph, "int8", "fp32")) + float(table.us(others).sum())


def _times(
    program: Program,
    layers: Collection[fx.Node],
    conversions: Mapping[fx.Node, Conversions],
    table: Table,
    progress: Tracker,
) -> dict[fx.Node, tuple[float, float]]:
    """Return the microseconds of layers in INT8 and in FP32."""
    batch = batch_of(program)
    configs = {node: one for node in layers if (one := config_of(node, batch)) is not None}
    table.fill(configs.values(), progress, FORMS)
    times = {}
    for node, one in configs.items():
        fp32 = table.ms(one, "fp32") * 1e3
        if _follows_convolution(node) and one.kind in ACTIVATIONS:
            fp32 = conversions[node].rearrange + fp32 if one.kind == "silu" else 0.0
        times[node] = table.ms(one, "int8") * 1e3, fp32
    return times


def _conversions(program: Program, table: Table, progress: Tracker) -> dict[fx.Node, Conversions]:
    """Return what it takes to convert each activation."""
    batch = batch_of(program)
    nodes = [node for node in program.graph.nodes if _is_activation(node)]
    wanted = {node: _conversion_configs(node, batch) for node in nodes}
    table.fill({one for configs in wanted.values() for one in configs}, progress, FORMS)
    found = {}
    for node, (quantize, dequantize, *transpose) in wanted.items():
        moved = [table.ms(one, form) * 1e3 for one in transpose for form in FORMS]
        rearrange, last = moved or (0.0, 0.0)
        there, back = (table.ms(one, "int8") * 1e3 for one in (quantize, dequantize))
        found[node] = Conversions(there, back, last, rearrange)
    return found


def _conversion_configs(node: fx.Node, batch: int) -> list[LayerConfig]:
    count, shape = _elements(node, batch), shape_of(node)
    found = [conversion("quantize", count), conversion("dequantize", count)]
    if len(shape) == IMAGE_DIMENSIONS and shape[0] == batch:
        found.append(LayerConfig("transpose", (), (1, *shape[1:])))
    return found


def _network(
    program: Program,
    times: Mapping[fx.Node, tuple[float, float]],
    conversions: Mapping[fx.Node, Conversions],
) -> nx.DiGraph[str]:
    """Build the graph whose cuts are divisions of the program, and cost what these take."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node, cost in conversions.items():
        if node in times:
            _arc(graph, node.name, "fp32", times[node][0])
            _arc(graph, "int8", node.name, times[node][1])
        elif not _follows(node):
            _arc(graph, node.name, "fp32", math.inf)
        blocks = cost.rearrange if _is_convolution(node) or _follows_convolution(node) else 0.0
        for reader in node.users:
            name = reader.name if _is_activation(reader) else "fp32"
            if not _gives_fp32(node):
                _arc(graph, node.name, name, cost.dequantize + cost.transpose)
            if name != "fp32":
                _arc(graph, name, node.name, cost.quantize + cost.transpose + blocks)
    return graph


def _arc(graph: nx.DiGraph[str], source: str, target: str, cost: float) -> None:
    held = graph.get_edge_data(source, target, {"capacity": 0.0})["capacity"]
    graph.add_edge(source, target, capacity=held + cost)


def _is_activation(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op != "get_attr" and isinstance(value, Tensor) and value.is_floating_point()


def _elements(node: fx.Node, batch: int) -> int:
    return max(int(node.meta["val"].numel()) // batch, 1)


def _follows(node: fx.Node) -> bool:
    """Whether a node takes INT8 where it gets it, and passes it on."""
    pattern = pattern_of(node)
    folded = packet_of(node) is aten.batch_norm  # into the layer before it
    follows = folded or (pattern is not None and pattern.follows)
    return follows or is_move(node) or operator_of(node).clamps


def _is_convolution(node: fx.Node) -> bool:
    return operator_of(node).kind == "convolution"


def _follows_convolution(node: fx.Node) -> bool:
    """Whether a node's one operand is an FP32 convolution's result, which may be in blocks."""
    sources = node.all_input_nodes
    return len(sources) == 1 and _is_convolution(sources[0])


def _gives_fp32(node: fx.Node) -> bool:
    pattern = pattern_of(node)
    return pattern is not None and not pattern.output
