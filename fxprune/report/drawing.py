"""A program's graph as boxes and lines on a plane: layered, top to bottom, few crossings.

The layers are longest paths from the inputs; the order within them follows the barycentres of the
neighbours (Sugiyama, Tagawa and Toda, 1981); the positions are, layer by layer, the least-squares
fit to the neighbours' positions that keeps the order and the gaps.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from scipy.optimize import isotonic_regression
from scipy.sparse import csr_array, diags_array
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program, shape_of

WIDTH, LINE, GAP_X, GAP_Y, LANE = 216.0, 15.0, 22.0, 30.0, 10.0  # pixels; a lane carries a line
MAX_LINE_CHARACTERS = 30  # that fit a line of a box
SWEEPS = 6


@dataclass(frozen=True)
class Box:
    """Operators that follow one another, the first of which may have weights.

    Attributes:
        title: the module of the first operator, or the name of an input or output.
        lines: the operators, and the shape of what they give.
        tensors: the parameters and buffers that they read.
        x, y: the middle of the upper edge, in pixels.
        height: in pixels.

    """

    title: str
    lines: tuple[str, ...]
    tensors: tuple[str, ...]
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Drawing:
    """Boxes, the lines between them as SVG paths, and the size of it all in pixels."""

    boxes: tuple[Box, ...]
    paths: tuple[str, ...]
    width: float
    height: float


def draw(program: Program) -> Drawing:
    """Lay out a program's graph."""
    chains = _chains(program)
    layers, links = _layers(chains)
    items = itertools.chain.from_iterable(layers)
    across = dict(zip(items, _across(layers, links), strict=True))
    height = {chain: _height(chain) for chain in chains}
    tops, y = [], 0.0
    for layer in layers:
        tops.append(y)
        y += max(height.get(item, 0.0) for item in layer) + GAP_Y
    boxes, ends = [], {}
    for top, layer in zip(tops, layers, strict=True):
        for item in layer:
            ends[item] = (across[item], top, height.get(item, 0.0))
            if item in height:
                boxes.append(_box(item, *ends[item]))
    paths = tuple(_path(ends[first], ends[second]) for first, second in links)
    width = max(across[chain] for chain in chains) + (WIDTH + GAP_X) / 2
    return Drawing(tuple(boxes), paths, width, y - GAP_Y)


Chain = tuple[fx.Node, ...]


def _chains(program: Program) -> nx.DiGraph[Any]:
    """Return the graph of tensors with operators joined that follow one another alone."""
    flow: nx.DiGraph[Any] = nx.DiGraph()
    for node in program.graph.nodes:
        if node.op == "get_attr" or not (node.op == "output" or _is_tensor(node)):
            continue
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes if source in flow)
    chain: dict[fx.Node, list[fx.Node]] = {}
    for node in flow:
        before = list(flow.predecessors(node))
        joins = (
            len(before) == 1
            and flow.out_degree(before[0]) == 1
            and node.op == "call_function"
            and before[0].op == "call_function"
            and not _has_matrix(node)
        )
        chain[node] = chain[before[0]] if joins else []
        chain[node].append(node)
    found = {node: tuple(nodes) for node, nodes in chain.items()}
    joined: nx.DiGraph[Any] = nx.DiGraph()
    joined.add_nodes_from(found.values())
    joined.add_edges_from(
        (found[first], found[second]) for first, second in flow.edges
        if found[first] != found[second]
    )  # fmt: skip
    return joined


def _is_tensor(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _has_matrix(node: fx.Node) -> bool:
    return any(len(shape_of(tensor)) > 1 for tensor in _tensors(node))


def _layers(chains: nx.DiGraph[Any]) -> tuple[list[list[Any]], list[tuple[Any, Any]]]:
    """Return layers by longest path, and links between neighbouring layers only.

    A line that crosses a layer has an item of its own there: a tuple of its ends and the layer.
    """
    level = _levels(chains)
    layers: list[list[Any]] = [[] for _ in range(max(level.values()) + 1)]
    for chain, number in level.items():
        layers[number].append(chain)
    links = []
    for first, second in chains.edges:
        crossed = [(first, second, between) for between in range(level[first] + 1, level[second])]
        for item in crossed:
            layers[item[2]].append(item)
        stops = [first, *crossed, second]
        links += list(itertools.pairwise(stops))
    return layers, links


def _levels(chains: nx.DiGraph[Any]) -> dict[Any, int]:
    """Return the longest path to each chain; what no input leads to stands above its first use."""
    level: dict[Any, int] = {}
    constant: set[Any] = set()
    order = list(nx.topological_sort(chains))
    for chain in order:
        before = list(chains.predecessors(chain))
        level[chain] = max((level[other] + 1 for other in before), default=0)
        if chain[0].op != "placeholder" and constant.issuperset(before):
            constant.add(chain)
    for chain in reversed(order):
        if chain in constant and chains.out_degree(chain):
            level[chain] = min(level[after] for after in chains.successors(chain)) - 1
    first = min(level.values())
    return {chain: number - first for chain, number in level.items()}


def _across(layers: Sequence[Sequence[Any]], links: Sequence[tuple[Any, Any]]) -> list[float]:
    """Place the items of all layers, one after the other, from left to right."""
    number = {item: place for place, item in enumerate(itertools.chain.from_iterable(layers))}
    ends = np.array([(number[first], number[second]) for first, second in links]).reshape(-1, 2)
    size = len(number)
    below = csr_array((np.ones(len(ends)), ends.T), shape=(size, size))
    bounds = np.cumsum([0, *map(len, layers)])
    ranges = [slice(*pair) for pair in itertools.pairwise(bounds.tolist())]
    x = np.concatenate([np.arange(len(layer), dtype=float) for layer in layers])
    down, up = ([(layer, means[layer]) for layer in ranges] for means in _means(below))
    sweeps = list(itertools.chain.from_iterable([*down, *reversed(up)] for _ in range(SWEEPS)))
    for layer, means in sweeps:
        x[layer][np.lexsort((x[layer], _wished(means, x, layer)))] = np.arange(len(x[layer]))
    half = np.array([_half(item) for item in number])
    for layer, means in sweeps:
        sorting = np.argsort(x[layer])
        wished, room = _wished(means, x, layer)[sorting], half[layer][sorting]
        gaps = np.cumsum(2 * room) - room
        x[layer][sorting] = isotonic_regression(wished - gaps).x + gaps
    return (x - (x - half).min()).tolist()  # type: ignore[no-any-return]


def _means(below: csr_array) -> list[csr_array]:
    """Return what gives the mean position of the neighbours above, and below, from positions."""
    return [
        (diags_array(1 / np.maximum(neighbours.sum(axis=1), 1)) @ neighbours).tocsr()
        for neighbours in (below.T.tocsr(), below)
    ]


def _wished(means: csr_array, x: Any, layer: slice) -> Any:
    """Return the mean position of each item's neighbours, or its own if it has none."""
    return np.where(np.diff(means.indptr) > 0, means @ x, x[layer])


def _half(item: Any) -> float:
    """Return half of the room that an item takes, gaps included."""
    return (WIDTH + GAP_X) / 2 if isinstance(item[0], fx.Node) else LANE / 2


def _text(chain: Chain) -> tuple[str, tuple[str, ...]]:
    first = chain[0]
    if first.op != "call_function":
        return first.name, (_shape(first),) if first.op == "placeholder" else ()
    stack = list((first.meta.get("nn_module_stack") or {"": ("", "")}).values())
    operators = " \u00b7 ".join(_operator(node) for node in chain)
    return (stack[-1][0] or first.name), (
        *textwrap.wrap(operators, MAX_LINE_CHARACTERS),
        _shape(chain[-1]),
    )


def _operator(node: fx.Node) -> str:
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
    matrices = [shape_of(tensor) for tensor in _tensors(node) if len(shape_of(tensor)) > 1]
    return " ".join([name, *("\u00d7".join(map(str, shape)) for shape in matrices)])


def _shape(node: fx.Node) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta["val"]) if isinstance(leaf, Tensor)]
    shapes = ["\u00d7".join(map(str, leaf.shape)) or "scalar" for leaf in leaves[:3]]
    return "\u2192 " + ", ".join(shapes + ["\u2026"] * (len(leaves) > 3))


def _height(chain: Chain) -> float:
    return LINE * (len(_text(chain)[1]) + 1) + 26  # the margins, and a row for the groups


def _box(chain: Chain, x: float, y: float, height: float) -> Box:
    title, lines = _text(chain)
    tensors = dict.fromkeys(str(tensor.target) for node in chain for tensor in _tensors(node))
    return Box(title, lines, tuple(tensors), x, y, height)


def _path(first: tuple[float, float, float], second: tuple[float, float, float]) -> str:
    """Draw from the lower edge of one item to the upper edge of another, both upright."""
    (x, y, height), (to_x, to_y, _) = first, second
    y += height
    middle = to_y - GAP_Y / 2
    bend = f"{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
    return f"M{x:.1f} {y:.1f}V{to_y - GAP_Y:.1f}C{bend}"
