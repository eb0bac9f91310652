"""Which layers are faster in INT8, by their times in both formats in the latency table.

Keeping a layer in FP32 needs conversions around it, unless its neighbours stay in FP32 too. The
fastest division of a program is a minimum cut of its graph: the source's side runs in INT8, the
sink's side in FP32. A layer's arcs to source and sink have its times as capacity, and an arc along
a value has the time of the conversion that a cut there needs.
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
# Activations that ONNX Runtime fuses into the FP32 convolution before them. SiLU is the exception:
# it needs the channels in their usual order.
ACTIVATIONS: tuple[Kind, ...] = ("sigmoid", "silu", "hard-sigmoid", "hard-swish")
IMAGE_DIMENSIONS = 4


@dataclass(frozen=True)
class LayerTiming:
    """The microseconds of a layer in INT8 and in FP32, and whether it will run in INT8."""

    int8: float
    fp32: float
    quantized: bool


@dataclass(frozen=True)
class Conversions:
    """The microseconds of conversions between the formats of one value.

    Attributes:
        quantize: FP32 to INT8.
        dequantize: INT8 to FP32.
        transpose: for images, channels first to channels last, as INT8 kernels need; else zero.
        rearrange: for images, to channels in blocks, as FP32 convolutions need; else zero.

    """

    quantize: float
    dequantize: float
    transpose: float
    rearrange: float


@dataclass(frozen=True)
class Division:
    """Which nodes run in INT8 so that the whole takes least.

    Attributes:
        layers: the timed layers.
        followers: nodes between them, such as sums, that run in INT8 too, even if a value that
            they read has to be converted.

    """

    layers: Mapping[fx.Node, LayerTiming]
    followers: frozenset[fx.Node]


def divide(
    program: Program, layers: Collection[fx.Node], table: Table, progress: Tracker
) -> Division:
    """Time layers in both formats, and choose a format for every node so that the sum is least."""
    conversions = _conversions(program, table, progress)
    times = _times(program, layers, conversions, table, progress)
    graph = _network(program, times, conversions)
    quantized, _ = nx.minimum_cut(graph, "int8", "fp32")[1]
    followers = frozenset(
        node
        for node in program.graph.nodes
        if (pattern := pattern_of(node)) is not None
        and pattern.follows
        and node not in times
        and node.name in quantized
    )
    timed = {node: LayerTiming(*pair, node.name in quantized) for node, pair in times.items()}
    return Division(timed, followers)


def least_us(program: Program, table: Table, progress: Tracker) -> float:
    """Return the microseconds of all layers of a program, in the fastest choice of formats.

    Layers with weights run in either format, including conversions; other layers, such as products
    of activations, run in FP32. Batch norms count as folded.
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
    """Return the times to convert each activation."""
    batch = batch_of(program)
    nodes = [node for node in program.graph.nodes if _is_activation(node)]
    wanted = {}
    for node in nodes:
        shape, count = shape_of(node), max(int(node.meta["val"].numel()) // batch, 1)
        wanted[node] = [conversion("quantize", count), conversion("dequantize", count)]
        if len(shape) == IMAGE_DIMENSIONS and shape[0] == batch:
            wanted[node].append(LayerConfig("transpose", (), (1, *shape[1:])))
    table.fill({one for configs in wanted.values() for one in configs}, progress, FORMS)
    found = {}
    for node, (quantize, dequantize, *transpose) in wanted.items():
        moved = [table.ms(one, form) * 1e3 for one in transpose for form in FORMS]
        rearrange, last = moved or (0.0, 0.0)
        there, back = (table.ms(one, "int8") * 1e3 for one in (quantize, dequantize))
        found[node] = Conversions(there, back, last, rearrange)
    return found


def _network(
    program: Program,
    times: Mapping[fx.Node, tuple[float, float]],
    conversions: Mapping[fx.Node, Conversions],
) -> nx.DiGraph[str]:
    """Build the graph whose cuts are divisions of the program; capacities are microseconds."""
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
            pattern = pattern_of(node)
            if pattern is None or pattern.output:  # else the INT8 kernel returns FP32
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


def _follows(node: fx.Node) -> bool:
    """Whether a node runs in INT8 if its input is INT8."""
    pattern = pattern_of(node)
    folded = packet_of(node) is aten.batch_norm  # into the layer before it
    follows = folded or (pattern is not None and pattern.follows)
    return follows or is_move(node) or operator_of(node).clamps


def _is_convolution(node: fx.Node) -> bool:
    return operator_of(node).kind == "convolution"


def _follows_convolution(node: fx.Node) -> bool:
    """Whether a node's only operand is a convolution's output, which may be in blocks in FP32."""
    sources = node.all_input_nodes
    return len(sources) == 1 and _is_convolution(sources[0])
