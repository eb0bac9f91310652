"""What is known of operators whatever their shapes: one record for each family of them.

What an operator does to removable dimensions is beside it in ``fxprune.structure.rules``. Users
register both with ``fxprune.operator_rule``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
from torch import fx

from fxprune.graph import macs
from fxprune.graph.macs import Place
from fxprune.graph.node_args import packet_of

aten = torch.ops.aten
Macs = Callable[[fx.Node], Sequence[tuple[Place, ...]]]
Kind = Literal[
    "convolution", "transposed-convolution", "linear", "product", "einsum", "attention",
    "recurrent", "norm", "join", "pad", "cast", "other",
]  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    Attributes:
        kind: the family, where something treats it in a way of its own.
        macs: called with a node, returns the products of dimensions (pairs of a node and one of
            its dimensions) that its multiply-accumulates are the sum of; None if it has none.
        weight_outputs: for layers, the dimension of the weight that counts output channels.
        left: for matrix products, which argument the left matrix is.
        moves_data: every element of the result is an element of its one operand, or padding.
        identity: in evaluation the result equals the operand.
        free: a runtime does no work for it, or folds it into the layer before.
        pointwise: an element of the result depends on the elements at its place only.
        piecewise_linear: linear in its operands, one at a time, or so in pieces.
        clamps: it limits values to a range, so that repeating it changes nothing.
        bounded: its results lie between -1 and 1, and are computed to within a part of that.

    """

    kind: Kind = "other"
    macs: Macs | None = None
    weight_outputs: int | None = None
    left: int = 0
    moves_data: bool = False
    identity: bool = False
    free: bool = False
    pointwise: bool = False
    piecewise_linear: bool = False
    clamps: bool = False
    bounded: bool = False

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed or not."""
        return self.kind in ("convolution", "transposed-convolution")

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or linear layer."""
        return self.weight_outputs is not None


UNKNOWN = Operator()
_POINTWISE = Operator(pointwise=True)
_CONVOLUTION = Operator("convolution", macs.convolution, weight_outputs=0, piecewise_linear=True)
_TRANSPOSED = Operator(
    "transposed-convolution", macs.transposed_convolution, weight_outputs=1, piecewise_linear=True
)
_COPY = Operator(moves_data=True, identity=True, free=True, piecewise_linear=True)
_MOVE = Operator(moves_data=True, piecewise_linear=True)
_LINEAR_PIECES = Operator(piecewise_linear=True)

FAMILIES: tuple[tuple[Operator, str], ...] = (
    (_CONVOLUTION, "conv1d conv2d conv3d"),
    (_TRANSPOSED, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (Operator("linear", macs.linear, weight_outputs=0, piecewise_linear=True), "linear"),
    (Operator("product", macs.product), "matmul mm bmm mv dot vdot inner linalg_matmul"),
    (Operator("product", macs.added_product, left=1), "baddbmm addmv"),
    (Operator("product", macs.added_product, left=1, piecewise_linear=True), "addmm"),
    (Operator("einsum", macs.einsum), "einsum"),
    (Operator(macs=macs.bilinear), "bilinear"),
    (Operator(macs=macs.outer), "outer addr"),
    (Operator(macs=macs.summed_product), "addbmm"),
    (Operator(macs=macs.tensordot), "tensordot"),
    (Operator("attention", macs.attention), "scaled_dot_product_attention"),
    (Operator("recurrent", macs.recurrent), "lstm gru rnn_tanh rnn_relu"),
    (Operator("recurrent", macs.recurrent_cell), "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    (Operator("norm", free=True, piecewise_linear=True), "batch_norm"),
    (Operator(identity=True, free=True, piecewise_linear=True),
     "dropout feature_dropout alpha_dropout"),
    (_COPY, "clone contiguous detach alias lift_fresh_copy"),
    (Operator("cast", piecewise_linear=True), "to _to_copy type_as"),
    (Operator(moves_data=True, free=True, piecewise_linear=True),
     "view reshape _unsafe_view view_as reshape_as flatten unflatten ravel squeeze unsqueeze"
     " atleast_2d atleast_3d t expand expand_as broadcast_to"),
    (_MOVE,
     "permute transpose numpy_T mT movedim moveaxis swapaxes swapdims split_with_sizes split chunk"
     " tensor_split unbind slice select narrow roll flip rot90 diagonal repeat tile"
     " repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle"),
    (Operator("pad", moves_data=True, piecewise_linear=True),
     "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d"
     " replication_pad2d replication_pad3d"),
    (Operator("join", piecewise_linear=True), "cat concat stack"),
    (Operator(pointwise=True, piecewise_linear=True, clamps=True),
     "relu relu6 hardtanh clamp clamp_min clamp_max"),
    (Operator(pointwise=True, piecewise_linear=True), "leaky_relu abs add sub neg"),
    (Operator(pointwise=True, bounded=True), "sigmoid tanh hardsigmoid sin cos erf"),
    (Operator(bounded=True), "softmax _softmax"),
    (_LINEAR_PIECES,
     "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d"
     " adaptive_avg_pool2d adaptive_avg_pool3d mean sum amax amin index index_select gather"
     " im2col col2im unfold"),
    # Pointwise, though PyTorch does not tag them so.
    (_POINTWISE,
     "where masked_fill lerp addcmul addcdiv rsub maximum minimum true_divide floor_divide"
     " multiply divide subtract copy copy_ _prelu_kernel bitwise_and bitwise_or bitwise_xor"
     " bitwise_not bitwise_left_shift bitwise_right_shift logical_and logical_or logical_xor"
     " logical_not __and__ __or__ __xor__ __lshift__ __rshift__ remainder fmod complex polar real"
     " imag angle isclose float_power"),
)  # fmt: skip


def packets(names: str) -> list[Any]:
    """Return the operators of these names, as far as this version of PyTorch has them."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


_RECORDS: dict[Any, Operator] = {
    packet: record for record, names in FAMILIES for packet in packets(names)
}
_registered: dict[Any, Operator] = {}


def register(packet: Any, record: Operator) -> None:
    """Let a record say what is known of an operator (all overloads), whatever was known before."""
    _registered[packet] = record


@functools.cache
def load_plugins() -> None:
    """Import what installed packages name in the entry-point group ``fxprune.operators``."""
    for entry in entry_points(group="fxprune.operators"):
        entry.load()


def operator_of(node: fx.Node) -> Operator:
    """Return the record of the operator that a node calls; one without facts if there is none."""
    packet = packet_of(node)
    if packet is None:
        return UNKNOWN
    load_plugins()
    record = _registered.get(packet) or _RECORDS.get(packet)
    if record is not None:
        return record
    return _POINTWISE if torch.Tag.pointwise in getattr(node.target, "tags", ()) else UNKNOWN
