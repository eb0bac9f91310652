"""Bias correction: what rounding shifts in a layer's mean output, its bias takes back.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv
1906.04721, section 4.2, by the empirical means of calibration samples. Layers are corrected in
order, each on inputs that are already corrected. Every batch moves the biases by its share, one
part in as many as there have been batches, so that they settle at the average.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.running import fixed_batch, placed
from fxprune.data.batches import batches
from fxprune.graph.cost import batch_of
from fxprune.graph.custom_ops import FAKE_QUANTIZE
from fxprune.graph.node_args import argument
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.pipeline.context import Context
from fxprune.quantization.patterns import pattern_of

MEMORY = 2**28  # bytes that a batch's largest value may fill


def correct_biases(program: Program, exact: Program, context: Context, samples: int) -> int:
    """Correct the bias of every fake-quantised layer that has one; returns how many.

    Args:
        program: with fake-quantisers.
        exact: the same with the weights and biases that means are to be those of.
        context: for calibration samples.
        samples: how many of them at most.

    """
    biases = {
        node: bias for node in program.graph.nodes if (bias := _own_bias(program, node)) is not None
    }
    program.refresh()  # memory is told by the values of nodes, and fake-quantisers are new
    count = min(samples, len(context.samples.calibration))
    fixed, most = fixed_batch(program), max(1, MEMORY // _largest(program))
    size = fixed or -(-count // -(-count // most))  # batches are about equal
    count -= count % (fixed or 1)
    with (
        placed(program.eval(), context.device),
        placed(exact.eval(), context.device),
        torch.no_grad(),
    ):
        stream = batches(
            context.samples.calibration, size, seed=context.seed, limit=count,
            device=context.device,
        )  # fmt: skip
        for number, batch in enumerate(stream):
            unrounded = _Exact(exact, {node.name for node in biases})
            unrounded.run(*batch.inputs)
            _Correcting(program, biases, unrounded.means, 1 / (number + 1)).run(*batch.inputs)
    return len(biases)


def _largest(program: Program) -> int:
    """Bytes of the largest value of one sample."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    sizes = (v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    return max(1, max(sizes, default=1) // batch_of(program))


def _own_bias(program: Program, node: fx.Node) -> str | None:
    """The name of a layer's bias, if it is stored for this layer alone."""
    pattern = pattern_of(node) if node.op == "call_function" else None
    if pattern is None or pattern.weight is None:
        return None
    weight, bias = node.args[1], argument(node, "bias")
    if not isinstance(weight, fx.Node) or weight.target is not FAKE_QUANTIZE:
        return None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    tensor = program.tensor(str(bias.target))
    readers = [
        user
        for each in program.tensor_nodes()
        if program.tensor(str(each.target)) is tensor
        for user in each.users
    ]
    return str(bias.target) if len(readers) == 1 else None


def _channel_means(node: fx.Node, value: Tensor) -> Tensor:
    """Average over all but the channels: the last dimension of a linear layer, else the second."""
    axis = value.dim() - 1 if node.target is torch.ops.aten.linear.default else 1
    return value.double().mean([dim for dim in range(value.dim()) if dim != axis])


class _Exact(fx.Interpreter):
    """Runs a program without rounding and keeps the means of layers."""

    def __init__(self, program: Program, layers: Collection[str]) -> None:
        super().__init__(program.graph_module)
        self._layers = layers
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is FAKE_QUANTIZE:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        value = super().run_node(n)
        if n.name in self._layers:
            self.means[n.name] = _channel_means(n, value)
        return value


class _Correcting(fx.Interpreter):
    """Runs a program with rounding and moves each bias until the layer's means are right."""

    def __init__(
        self,
        program: Program,
        layers: Mapping[fx.Node, str],
        means: Mapping[str, Tensor],
        share: float,
    ) -> None:
        super().__init__(program.graph_module)
        self._program, self._layers, self._means, self._share = program, layers, means, share

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self._layers:
            return value
        shift = (self._share * (self._means[n.name] - _channel_means(n, value))).to(value.dtype)
        bias = self._program.tensor(self._layers[n])
        set_tensor(self._program, self._layers[n], bias.detach() + shift)
        last = n.target is torch.ops.aten.linear.default
        return value + (shift if last else shift.view(-1, *[1] * (value.dim() - 2)))
