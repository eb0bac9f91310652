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
from torch import Tensor, fx

from fxprune.graph.cost import batch_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.latency.layer_config import FORMS, conversion
from fxprune.latency.layers import Kind
from fxprune.latency.table import Table
from fxprune.latency.terms import config_of
from fxprune.pipeline.progress import Tracker
from fxprune.quantization.patterns import is_move, pattern_of


@dataclass(frozen=True)
class LayerTiming:
    """One layer's microseconds in INT8 and in FP32, and whether it is to run in INT8."""

    int8: float
    fp32: float
    quantized: bool


def layer_timings(
    program: Program, layers: Collection[fx.Node], table: Table, progress: Tracker
) -> dict[fx.Node, LayerTiming]:
    """Time layers in both forms and divide them so that the whole takes least."""
    batch = batch_of(program)
    configs = {node: one for node in layers if (one := config_of(node, batch)) is not None}
    table.fill(configs.values(), progress, FORMS)
    times = {
        node: (
            table.ms(one, "int8") * 1e3,
            0.0 if _joins_convolution(node, one.kind) else table.ms(one, "fp32") * 1e3,
        )
        for node, one in configs.items()
    }
    graph = _network(program, times, _conversions(program, batch, table, progress))
    quantized, _ = nx.minimum_cut(graph, "int8", "fp32")[1]
    return {node: LayerTiming(*pair, node.name in quantized) for node, pair in times.items()}


def _conversions(
    program: Program, batch: int, table: Table, progress: Tracker
) -> dict[fx.Node, tuple[float, float]]:
    """Return the microseconds that it takes to convert each activation to INT8, and from it."""
    counts = {node: _elements(node, batch) for node in program.graph.nodes if _is_activation(node)}
    both = {
        count: (conversion("quantize", count), conversion("dequantize", count))
        for count in set(counts.values())
    }
    table.fill((one for pair in both.values() for one in pair), progress, ("int8",))
    return {
        node: (table.ms(both[count][0], "int8") * 1e3, table.ms(both[count][1], "int8") * 1e3)
        for node, count in counts.items()
    }


def _network(
    program: Program,
    times: Mapping[fx.Node, tuple[float, float]],
    conversions: Mapping[fx.Node, tuple[float, float]],
) -> nx.DiGraph[str]:
    """Build the graph whose cuts are divisions of the program, and cost what these take."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in conversions:
        if node in times:
            _arc(graph, node.name, "fp32", times[node][0])
            _arc(graph, "int8", node.name, times[node][1])
        elif not _follows(node):
            _arc(graph, node.name, "fp32", math.inf)
        quantize, dequantize = conversions[node]
        for reader in node.users:
            name = reader.name if _is_activation(reader) else "fp32"
            if not _gives_fp32(node):
                _arc(graph, node.name, name, dequantize)
            if name != "fp32":
                _arc(graph, name, node.name, quantize)
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
    follows = pattern is not None and pattern.follows
    return follows or is_move(node) or operator_of(node).clamps


def _joins_convolution(node: fx.Node, kind: Kind) -> bool:
    """Whether ONNX Runtime computes an activation within the FP32 convolution before it."""
    if kind not in ("sigmoid", "hard-sigmoid", "hard-swish"):
        return False
    source = node.all_input_nodes[0]
    return operator_of(source).kind == "convolution" and len(source.users) == 1


def _gives_fp32(node: fx.Node) -> bool:
    pattern = pattern_of(node)
    return pattern is not None and not pattern.output
