"""Fold batch norms into the convolution or linear layer before them.

Before:
    conv2d: 1x4x6x6 = conv2d(x, weight)
    batch_norm: 1x4x6x6 = batch_norm(conv2d, gamma, beta, mean, var)

After:
    conv2d: 1x4x6x6 = conv2d(x, weight', bias')

    weight' = weight * gamma / sqrt(var + eps)   per output channel
    bias'   = beta + (bias - mean) * gamma / sqrt(var + eps)

The layer may be a dense, grouped, depthwise or transposed convolution of any dimension, or a linear
layer; the norm may also read a concat of such layers, or of slices of them. The arithmetic is in
float64. A norm is skipped if the output or the weights of the layer have other readers, if a weight
is computed instead of stored, if the norm has no running statistics or is in training mode, or if
its channels are not those of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxprune.graph.facts import MASKS, REMOVED
from fxprune.graph.node_args import argument
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of
from fxprune.graph.surgery import drop_unused, read_tensor, replace_node, set_tensor, unused_name
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Facts, Outcome, Pass, Skip
from fxprune.structure.concat_sources import makers, read_elsewhere

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm that directly follows a convolution or linear layer."""

    name: ClassVar[str] = "fold-batchnorm"
    keeps: ClassVar[Facts] = frozenset({REMOVED, MASKS})

    def run(self, program: Program, context: Context) -> Outcome:
        """Fold; changes counts batch norms."""
        skips, folded = [], 0
        for node in list(program.graph.nodes):
            if node.target is not aten.batch_norm.default:
                continue
            if reason := _obstacle(program, node):
                skips.append(Skip(node.name, reason))
                continue
            _fold(program, node)
            folded += 1
        if folded:
            drop_unused(program)
        return Outcome(folded, tuple(skips))

    def ensures(
        self, program: Program, context: Context, outcome: Outcome
    ) -> Iterator[tuple[str, bool]]:
        """Every batch norm that is left was declined for a reason."""
        left = [node for node in program.graph.nodes if node.target is aten.batch_norm.default]
        declined = {skip.node for skip in outcome.skips}
        yield "it folds or declines every batch norm", {node.name for node in left} <= declined


def _obstacle(program: Program, norm: fx.Node) -> str | None:
    value: Any = norm.args[0]
    layers = makers(value)
    if any(not operator_of(layer).is_layer for layer in layers):
        return "its input is not a convolution or linear layer"
    if (shared := read_elsewhere(value)) is not None:
        return f"the output of {shared.name} is used elsewhere too"
    if not all(isinstance(item, fx.Node) for item in norm.args[3:5]):
        return "it has no running statistics; it normalises by the batch even in evaluation"
    if norm.args[5]:
        return "it is in training mode; call Program.eval() first"
    return next(filter(None, (_obstacle_in(program, norm, layer) for layer in layers)), None)


def _obstacle_in(program: Program, norm: fx.Node, layer: Any) -> str | None:
    stored = [
        item for item in (layer.args[1], argument(layer, "bias")) if isinstance(item, fx.Node)
    ]
    rest = [item for item in norm.args[1:5] if isinstance(item, fx.Node)]
    for part in [*stored, *rest]:
        if part.op != "get_attr":
            return f"{part.name} is computed, not stored; fold needs constant weights"
    if len(shape_of(layer)) != len(shape_of(stored[0])):  # tokens x features, or no batch
        return f"the channels of {layer.name} are not along the dimension that it normalises"
    if _readers(program, stored) > len(stored):
        return f"the weight or bias of {layer.name} is shared with another layer"
    return None


def _readers(program: Program, parts: list[fx.Node]) -> int:
    """How many calls read the tensors that these nodes read, under any name."""
    tensors = {id(program.tensor(str(part.target))) for part in parts}
    return sum(
        len(node.users)
        for node in program.tensor_nodes()
        if id(program.tensor(str(node.target))) in tensors
    )


def _fold(program: Program, norm: fx.Node) -> None:
    value: Any = norm.args[0]
    gamma, beta, mean, variance = (_value(program, item) for item in norm.args[1:5])
    eps: Any = norm.args[7]
    scale = (variance + eps).rsqrt() * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    for layer, channels in makers(value).items():
        mine = channels.to(scale.device)
        _fold_into(program, layer, scale[mine], shift[mine])
    replace_node(program, norm, value)


def _fold_into(program: Program, layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Let a layer scale and shift its outputs."""
    weight_name, bias_node = str(layer.args[1].target), argument(layer, "bias")
    weight, bias = program.tensor(weight_name), _value(program, bias_node)
    folded = weight.detach().double() * _along_outputs(layer, scale, weight)
    set_tensor(program, weight_name, folded.to(weight.dtype))
    if bias is not None:
        shift = shift + bias * scale
        set_tensor(program, str(bias_node.target), shift.to(weight.dtype))
        return
    name = unused_name(program, f"{weight_name.removesuffix('weight')}bias")
    value = shift.to(weight.dtype).requires_grad_(weight.requires_grad)
    set_tensor(program, name, value)
    _set_bias(layer, read_tensor(program, name, before=layer))


def _along_outputs(layer: fx.Node, scale: Tensor, weight: Tensor) -> Tensor:
    """Shape a scale per output channel so that it multiplies the weight."""
    rest = [1] * (weight.dim() - 2)
    if operator_of(layer).weight_outputs == 0:
        return scale.view(-1, 1, *rest)
    # Transposed: each block of input rows makes its own share of the output channels.
    groups = argument(layer, "groups")
    shares = scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return shares.view(*shares.shape, *rest)


def _value(program: Program, item: object) -> Any:
    if not isinstance(item, fx.Node):
        return None
    return program.tensor(str(item.target)).detach().double()


def _set_bias(layer: fx.Node, bias: fx.Node) -> None:
    if len(layer.args) > 2:
        layer.update_arg(2, bias)
    else:
        layer.args = (*layer.args[:2], bias)
        layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
