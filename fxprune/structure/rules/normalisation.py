"""Normalisations. Those that mix units with each other say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.graph.operators import packets
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.pointwise import pointwise
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def per_channel(flow: Flow, node: fx.Node) -> Any:
    """Batch and instance norm treat every channel alone; what else they average over is mixed.

    Batch norm without running statistics serves to standardise weights.
    """
    given = arguments(node)
    operand = flow.labels(given["input"])
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = [flow.labels(given[name]) for name in names if isinstance(given[name], fx.Node)]
    entries = flow.align(node, [(operand, 1), *((vector, 0) for vector in vectors)], 1)
    if given["running_mean"] is None or given.get("use_input_stats", given.get("training")):
        flow.mix(node, operand.without(1))
    return Labels(operand.shape, operand.without(1) + entries)


def layer_norm(flow: Flow, node: fx.Node) -> Any:
    """Layer and RMS norm over the last dimensions: removal changes the statistics."""
    given = arguments(node)
    operand = flow.labels(given["input"])
    first = len(operand.shape) - len(given["normalized_shape"])
    vectors = [
        flow.labels(given[name])
        for name in ("weight", "bias")
        if isinstance(given.get(name), fx.Node)
    ]
    entries = tuple(entry for entry in operand.entries if entry.dim < first)
    for dim in range(first, len(operand.shape)):
        met = [(operand, dim), *((vector, dim - first) for vector in vectors)]
        aligned = flow.align(node, met, dim)
        flow.mix(node, aligned)
        entries += aligned
    return Labels(operand.shape, entries)


def group_norm(flow: Flow, node: fx.Node) -> Any:
    """Whole groups go without touching others; the same offset in every group mixes."""
    given = arguments(node)
    operand, groups = flow.labels(given["input"]), given["num_groups"]
    vectors = [
        flow.labels(given[name]) for name in ("weight", "bias") if isinstance(given[name], fx.Node)
    ]
    entries = flow.align(node, [(operand, 1), *((vector, 0) for vector in vectors)], 1)
    flow.mix(node, [entry for entry in operand.entries if entry.dim > 1])
    width = operand.shape[1] // groups
    grouped: tuple[DimLabels, ...] = ()
    for entry in entries:
        matrix = entry.ids.view(groups, width)
        whole = groups >= width
        first = matrix[:, :1] if whole else matrix[:1]
        flow.merge(node, first.expand_as(matrix), matrix)
        grouped += (DimLabels(1, first.expand_as(matrix).reshape(-1)),)
        if not whole:
            flow.mix(node, grouped[-1:])
    return Labels(operand.shape, operand.without(1) + grouped)


def softmax(flow: Flow, node: fx.Node) -> Any:
    """What is removed would still take its share: the dimension stays."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dim"]
    flow.freeze(node, operand.at(dim), "a softmax normalises along it")
    return Labels(operand.shape, operand.without(dim))


def _dims(given: dict[str, Any], rank: int) -> list[int]:
    dim = given.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [item % max(rank, 1) for item in ([dim] if isinstance(dim, int) else dim)]


def reduction(flow: Flow, node: fx.Node) -> Any:
    """A statistic over removable dimensions mixes them; the other dimensions pass."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    if "other" in given:  # the larger or smaller of two
        return pointwise(flow, node)
    rank = len(operand.shape)
    dims = _dims(given, rank)
    flow.mix(node, [entry for entry in operand.entries if entry.dim in dims])
    return _reduced(node, operand, dims)


def _reduced(node: fx.Node, operand: Labels, dims: list[int]) -> Any:
    value = node.meta["val"]
    kept = [dim for dim in range(len(operand.shape)) if dim not in dims]
    outputs = value if isinstance(value, (list, tuple)) else [value]
    made = []
    for output in outputs:
        same_rank = output.dim() == len(operand.shape)
        entries = tuple(
            DimLabels(entry.dim if same_rank else kept.index(entry.dim), entry.ids)
            for entry in operand.entries
            if entry.dim in kept
        )
        made.append(Labels(tuple(output.shape), entries))
    return made if isinstance(value, (list, tuple)) else made[0]


def positional(flow: Flow, node: fx.Node) -> Any:
    """Results that count or order positions along a dimension fix it."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    dims = _dims(given, len(operand.shape))
    fixed = [entry for entry in operand.entries if entry.dim in dims]
    flow.freeze(node, fixed, "an operator orders or counts its positions")
    rest = Labels(operand.shape, tuple(item for item in operand.entries if item.dim not in dims))
    value = node.meta["val"]
    first = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(first, Tensor) and first.dim() == len(operand.shape):
        made = [Labels(tuple(item.shape), rest.entries)
                for item in (value if isinstance(value, (list, tuple)) else [value])]  # fmt: skip
        return made if isinstance(value, (list, tuple)) else made[0]
    return _reduced(node, operand, dims)


def transform(flow: Flow, node: fx.Node) -> Any:
    """A Fourier transform mixes what it runs along for good; the other dimensions pass."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    rank = len(operand.shape)
    default = list(range(rank)) if str(node.target).split(".")[1].endswith("n") else [rank - 1]
    dims = _dims(given, rank) if given.get("dim") is not None else default
    along = [entry for entry in operand.entries if entry.dim in dims]
    flow.freeze(node, along, "a Fourier transform runs along it")
    return Labels(tuple(node.meta["val"].shape), operand.without(*dims))


def pairs(flow: Flow, node: fx.Node) -> Any:
    """Real and imaginary parts are the last dimension of the real tensor."""
    operand, value = flow.labels(node.args[0]), node.meta["val"]
    rank = min(len(operand.shape), value.dim())
    flow.freeze(
        node, [x for x in operand.entries if x.dim >= rank], "it holds real and imaginary parts"
    )
    return Labels(tuple(value.shape), tuple(x for x in operand.entries if x.dim < rank))


def similarity(flow: Flow, node: fx.Node) -> Any:
    """The cosine of the angle between vectors along a dimension, whose lengths mix them."""
    given = arguments(node)
    left, right = flow.labels(given["x1"]), flow.labels(given["x2"])
    rank = max(len(left.shape), len(right.shape))
    dim = given["dim"] % rank
    entries: tuple[DimLabels, ...] = ()
    for number in range(rank):
        met = [
            (labels, number - rank + len(labels.shape))
            for labels in (left, right)
            if number - rank + len(labels.shape) >= 0
        ]
        aligned = flow.align(node, met, number - (number > dim))
        if number == dim:
            flow.mix(node, aligned)
        else:
            entries += aligned
    return Labels(tuple(node.meta["val"].shape), entries)


MIXING = (
    "mean var std var_mean std_mean amax amin max min norm linalg_vector_norm logsumexp prod"
    " any all aminmax median sum nansum count_nonzero"
)
POSITIONAL = "argmax argmin sort topk cumsum cumprod argsort kthvalue cummax cummin logcumsumexp"
TRANSFORMS = [
    f"{inverse}{kind}fft{extent}"
    for inverse in ("", "i")
    for kind in ("", "r", "h")
    for extent in ("", "2", "n")
]


def _normalized_shape(node: fx.Node, remaining: Remaining) -> None:
    shape: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(remaining.before[0])
    node.update_arg(1, [remaining.size(rank - len(shape) + number) for number in range(len(shape))])


def _group_norm(node: fx.Node, remaining: Remaining) -> None:
    groups, mask = int(node.args[1]), remaining.kept[0].get(1)  # type: ignore[arg-type]
    if mask is not None:
        node.update_arg(1, int(mask.view(groups, -1).any(1).sum()))


RULES: dict[Any, OperatorRule] = {
    **dict.fromkeys((aten.batch_norm, aten.instance_norm), OperatorRule(per_channel)),
    **dict.fromkeys((aten.layer_norm, aten.rms_norm), OperatorRule(layer_norm, _normalized_shape)),
    aten.group_norm: OperatorRule(group_norm, _group_norm),
    **dict.fromkeys((aten.softmax, aten._softmax, aten.log_softmax), OperatorRule(softmax)),
    **{getattr(aten, f"fft_{name}"): OperatorRule(transform) for name in TRANSFORMS},
    **dict.fromkeys((aten.view_as_complex, aten.view_as_real), OperatorRule(pairs)),
    aten.cosine_similarity: OperatorRule(similarity),
    **dict.fromkeys(packets(MIXING), OperatorRule(reduction)),
    **dict.fromkeys(packets(POSITIONAL), OperatorRule(positional)),
}
