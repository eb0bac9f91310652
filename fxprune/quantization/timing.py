"""Which layers gain by codes: each is timed on codes and on floats in one session.

What leaving a layer in floats saves must pay for the conversions around it, unless its neighbours
stay in floats too. The cheapest division of a program is a minimum cut of its graph: the source's
side runs on codes, the sink's on floats; a layer's arcs to both cost its times, and an arc along a
value costs the conversion that a cut there would need.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from fxprune.graph.cost import batch_of
from fxprune.graph.node_args import packet_of
from fxprune.graph.program import Program
from fxprune.latency.layer_config import OPSET, Shape, operator
from fxprune.latency.table import RUNS, SWEEPS, sessions
from fxprune.latency.terms import shape_of_layer
from fxprune.onnx.profile import Profiled, profile
from fxprune.pipeline.progress import Tracker
from fxprune.quantization.patterns import CLAMPS, is_move, pattern_of

Pair = tuple[float, float]
SCALE = 0.02


@dataclass(frozen=True)
class Pace:
    """One layer's microseconds on codes and on floats, and whether it is to run on codes."""

    codes: float
    floats: float
    coded: bool


def paces(
    program: Program, layers: Collection[fx.Node], threads: int, progress: Tracker
) -> dict[fx.Node, Pace]:
    """Time layers in both forms and divide them so that the whole takes least."""
    batch = batch_of(program)
    shapes = {node: shape_of_layer(node, batch) for node in layers}
    counts = {_elements(node, batch) for node in program.graph.nodes if _is_activation(node)}
    found = _measured(set(shapes.values()), counts, threads, progress)
    times = {node: found[shape.key] for node, shape in shapes.items()}
    graph = _network(program, times, {count: found[_conversion(count)] for count in counts}, batch)
    coded, _ = nx.minimum_cut(graph, "codes", "floats")[1]
    return {node: Pace(*pair, node.name in coded) for node, pair in times.items()}


def _network(
    program: Program, times: Mapping[fx.Node, Pair], conversions: Mapping[int, Pair], batch: int
) -> nx.DiGraph[str]:
    """The graph whose cuts are divisions of the program, and cost what these take."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in filter(_is_activation, program.graph.nodes):
        if node in times:
            _arc(graph, node.name, "floats", times[node][0])
            _arc(graph, "codes", node.name, times[node][1])
        elif not _follows(node):
            _arc(graph, node.name, "floats", math.inf)
        encode, decode = conversions[_elements(node, batch)]
        for reader in node.users:
            name = reader.name if _is_activation(reader) else "floats"
            if not _ends_in_floats(node):
                _arc(graph, node.name, name, decode)
            if name != "floats":
                _arc(graph, name, node.name, encode)
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
    """Whether a node takes codes where it gets them, and gives them on."""
    pattern = pattern_of(node)
    follows = pattern is not None and pattern.follows
    return follows or is_move(node) or packet_of(node) in CLAMPS


def _ends_in_floats(node: fx.Node) -> bool:
    pattern = pattern_of(node)
    return pattern is not None and not pattern.output


def _conversion(count: int) -> str:
    return f"conversion {count}"


def _measured(
    shapes: Iterable[Shape], counts: Iterable[int], threads: int, progress: Tracker
) -> dict[str, Pair]:
    """Time layers on codes and on floats, and conversions to codes and from them, by key."""
    parts: list[tuple[Sequence[Shape], Sequence[int]]] = [((), sorted(counts))]
    parts += [(part, ()) for part in sessions(sorted(shapes))]
    found: dict[str, Pair] = {}
    runs = [part for part in parts for _ in range(SWEEPS)]
    for part in progress.track(runs, "timing layers on codes and floats", total=len(runs)):
        for key, pair in _timed(*part, threads).items():
            found[key] = tuple(map(min, pair, found.get(key, pair)))  # type: ignore[assignment]
    return found


def timed_model(shapes: Sequence[Shape], counts: Sequence[int]) -> bytes:
    """Return an ONNX model that computes layers on codes and on floats, and converts values."""
    model = _Model()
    for number, shape in enumerate(shapes):
        model.add_layer(number, shape)
    for count in counts:
        model.add_conversions(count)
    return model.encoded()


def _timed(shapes: Sequence[Shape], counts: Sequence[int], threads: int) -> dict[str, Pair]:
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        profiled = profile(timed_model(shapes, counts), threads, RUNS, Path(scratch))
    keys = {f"_{number}": shape.key for number, shape in enumerate(shapes)}
    keys |= {f"_of{count}": _conversion(count) for count in counts}
    return {
        key: (_us(profiled, f"codes{stem}"), _us(profiled, f"floats{stem}"))
        for stem, key in keys.items()
    }


def _us(profiled: Mapping[str, Profiled], name: str) -> float:
    """The time of a node, which optimisers may have given a suffix."""
    endings = ("_nchwc", "_token")
    return sum(
        node.us
        for found, node in profiled.items()
        if found == name or any(found.startswith(name + ending) for ending in endings)
    )


class _Model:
    """An ONNX model that grows by layers in two forms."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._outputs: list[Any] = []
        self._inputs: dict[str, Any] = {}
        self._store("scale", np.float32(SCALE))
        self._store("zero", np.uint8(0))

    def add_layer(self, number: int, shape: Shape) -> None:
        left, right = shape.operands
        axis = 1 if shape.kind == "linear" else 0
        name, attributes = operator(shape)
        self._store(f"w{number}", self._random.standard_normal(right, dtype=np.float32))
        plain = [self._source("x", left, TensorProto.FLOAT), f"w{number}"]
        self._add(name, plain, f"floats_{number}", TensorProto.FLOAT, **attributes)
        weight = self._random.integers(-60, 60, right).astype(np.int8)
        bias = np.zeros(right[axis], np.int32)
        codes = self._source("c", left, TensorProto.UINT8)
        self._node("DequantizeLinear", [codes, "scale", "zero"], f"in{number}")
        read = [f"in{number}"]
        read += [
            self._decoded(f"cw{number}", weight, axis, SCALE),
            self._decoded(f"cb{number}", bias, 0, SCALE * SCALE),
        ]
        if shape.kind == "linear":  # its sums go on as floats
            self._add("Gemm", read, f"codes_{number}", TensorProto.FLOAT)
            return
        self._node(name, read, f"codes_{number}", **attributes)
        self._node("Relu", [f"codes_{number}"], f"relu{number}")
        self._add("QuantizeLinear", [f"relu{number}", "scale", "zero"], f"out{number}",
                  TensorProto.UINT8)  # fmt: skip

    def add_conversions(self, count: int) -> None:
        """Add the way to codes, under the name of codes, and the way back."""
        plain = self._source("x", (count,), TensorProto.FLOAT)
        codes = self._source("c", (count,), TensorProto.UINT8)
        ends = ["scale", "zero"]
        self._add("QuantizeLinear", [plain, *ends], f"codes_of{count}", TensorProto.UINT8)
        self._add("DequantizeLinear", [codes, *ends], f"floats_of{count}", TensorProto.FLOAT)

    def encoded(self) -> bytes:
        inputs = list(self._inputs.values())
        graph = helper.make_graph(self._nodes, "layers", inputs, self._outputs, self._weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        encoded: bytes = model.SerializeToString()
        return encoded

    def _store(self, name: str, values: Any) -> None:
        self._weights.append(numpy_helper.from_array(np.asarray(values), name))

    def _source(self, stem: str, shape: tuple[int, ...], kind: int) -> str:
        name = f"{stem}{'_'.join(map(str, shape))}"
        self._inputs[name] = helper.make_tensor_value_info(name, kind, shape)
        return name

    def _decoded(self, name: str, codes: Any, axis: int, scale: float) -> str:
        size = codes.shape[axis]
        self._store(name, codes)
        self._store(f"{name}_scale", np.full(size, scale, np.float32))
        self._store(f"{name}_zero", np.zeros(size, codes.dtype))
        read = [name, f"{name}_scale", f"{name}_zero"]
        self._node("DequantizeLinear", read, f"{name}_decoded", axis=axis)
        return f"{name}_decoded"

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> None:
        self._nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))

    def _add(self, kind: str, inputs: list[str], name: str, type_: int, **attributes: Any) -> None:
        self._node(kind, inputs, name, **attributes)
        self._outputs.append(helper.make_tensor_value_info(name, type_, None))
