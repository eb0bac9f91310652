"""Bias correction: biases compensate for the shift that rounding causes in mean outputs.

The method is that of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv 1906.04721, section 4.2, with the means of calibration samples. Layers are
corrected in order, each on inputs that are already corrected. Batch ``n`` moves the biases by
``1/n`` of its own correction, so that they converge to the average over batches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from fxprune.calibration.running import placed
from fxprune.calibration.stream import calibration_stream
from fxprune.graph.cost import batch_of
from fxprune.graph.custom_ops import FAKE_QUANTIZE
from fxprune.graph.hooks import Call, Hook, visit
from fxprune.graph.node_args import argument
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context
from fxprune.quantization.fake_quantizers import unrounding
from fxprune.quantization.patterns import pattern_of

MAX_VALUE_BYTES = 2**28  # of the largest value of a batch


def correct_biases(program: Program, exact: Program, context: Context, samples: int) -> int:
    """Correct the bias of every fake-quantised layer that has one; return their number.

    Args:
        program: a program with fake-quantisers.
        exact: the same program with unrounded weights, whose means the outputs should have.
        context: calibration samples, device and seed.
        samples: largest number of calibration samples.

    """
    biases = {
        node: bias for node in program.graph.nodes if (bias := _own_bias(program, node)) is not None
    }
    program.refresh()  # fake-quantisers have no shapes yet
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    sizes = (v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    sample_bytes = max(1, max(sizes, default=1) // batch_of(program))
    size = max(1, MAX_VALUE_BYTES // sample_bytes)
    stream = calibration_stream(program, context, samples, size, remainder="spread")
    means: dict[str, Tensor] = {}
    watched = _unrounded(exact, {node.name for node in biases}, means)
    with (
        placed(program.eval(), context.device),
        placed(exact.eval(), context.device),
        torch.no_grad(),
    ):
        for number, batch in enumerate(stream):
            visit(exact, batch.inputs, watched)
            visit(program, batch.inputs, _corrected(program, biases, means, 1 / (number + 1)))
    return len(biases)


def _own_bias(program: Program, node: fx.Node) -> str | None:
    """The name of a layer's bias, if no other layer reads it."""
    pattern = pattern_of(node) if node.op == "call_function" else None
    if pattern is None or pattern.weight is None:
        return None
    weight, bias = node.args[1], argument(node, "bias")
    if not isinstance(weight, fx.Node) or weight.target is not FAKE_QUANTIZE:
        return None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    name = str(bias.target)
    return name if len(program.readers(name)) == 1 else None


def _channel_means(node: fx.Node, value: Tensor) -> Tensor:
    """Means per channel: the last dimension of a linear layer, the second of other layers."""
    axis = value.dim() - 1 if node.target is torch.ops.aten.linear.default else 1
    return value.double().mean([dim for dim in range(value.dim()) if dim != axis])


def _unrounded(
    exact: Program, layers: Collection[str], means: dict[str, Tensor]
) -> dict[fx.Node, Hook]:
    """Hooks that skip all rounding and record the means of layers."""

    def keep(call: Call) -> Tensor:
        value: Tensor = call.value()
        means[call.node.name] = _channel_means(call.node, value)
        return value

    hooks: dict[fx.Node, Hook] = unrounding(exact)
    return hooks | {node: keep for node in exact.graph.nodes if node.name in layers}


def _corrected(
    program: Program, layers: Mapping[fx.Node, str], means: Mapping[str, Tensor], share: float
) -> dict[fx.Node, Hook]:
    """Hooks that move each bias by a share of the error of its layer's means."""

    def correct(call: Call) -> Tensor:
        node, name, value = call.node, layers[call.node], call.value()
        shift = (share * (means[node.name] - _channel_means(node, value))).to(value.dtype)
        set_tensor(program, name, program.tensor(name).detach() + shift)
        last = node.target is torch.ops.aten.linear.default
        found: Tensor = value + (shift if last else shift.view(-1, *[1] * (value.dim() - 2)))
        return found

    return dict.fromkeys(layers, correct)
