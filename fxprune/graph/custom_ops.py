"""The operators of quantised programs: observe, fake-quantise, quantise, dequantise.

``scale`` and ``zero_point`` are scalars, or vectors along ``axis``. A code ``c`` stands for the
number ``scale * (c - zero_point)``; rounding is to the nearest code, halves to the even one, as
ONNX's QuantizeLinear does. Importing this module declares the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fxprune::observe", mutates_args=())
def observe(x: Tensor, key: str, low: int, high: int, symmetric: bool, axis: int) -> Tensor:
    """Return the value itself, where codes ``low`` to ``high`` are to come.

    Args:
        x: an activation or a weight.
        key: observers of one key share one scale.
        low: the lowest code.
        high: the highest code.
        symmetric: the code 0 stands for the number 0.
        axis: the dimension with a scale of its own for every index; -1 for one scale in all.

    """
    return x.clone()


@observe.register_fake
def _(x: Tensor, key: str, low: int, high: int, symmetric: bool, axis: int) -> Tensor:
    return torch.empty_like(x)


def _observe_backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None


observe.register_autograd(_observe_backward)


@torch.library.custom_op("fxprune::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int
) -> Tensor:
    """Round to the nearest number that has a code from ``low`` to ``high``.

    The gradient passes straight through where no code is out of range (arXiv 1308.3432); that of
    the scale is the one of learned step sizes (arXiv 1902.08153, equation 3).
    """
    step, zero = along(scale, x, axis), along(zero_point, x, axis)
    codes = (x / step).round_().add_(zero).clamp_(low, high)
    return codes.sub_(zero).mul_(step)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.codes = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = context.saved_tensors
    low, high, axis = context.codes
    step, zero = along(scale, x, axis), along(zero_point, x, axis).to(scale.dtype)
    steps = x / step
    nearest = torch.round(steps)
    inside = (nearest + zero >= low) & (nearest + zero <= high)
    of_x = gradient * inside
    if not context.needs_input_grad[1]:
        return of_x, None, None, None, None, None
    codes = torch.clamp(nearest, low - zero, high - zero)
    of_scale = gradient * torch.where(inside, codes - steps, codes)
    others = [dim for dim in range(x.dim()) if scale.dim() == 0 or dim != axis]
    return of_x, of_scale.sum(others) if others else of_scale, None, None, None, None


fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_keep)


@torch.library.custom_op("fxprune::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return the nearest codes, of the type of ``zero_point``; out of range, the outermost."""
    limits = torch.iinfo(zero_point.dtype)
    codes = (x / along(scale, x, axis)).round_().add_(along(zero_point, x, axis))
    return codes.clamp_(limits.min, limits.max).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("fxprune::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return the numbers that codes stand for."""
    zero = along(zero_point, codes, axis)
    return codes.to(scale.dtype).sub_(zero).mul_(along(scale, codes, axis))


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """Shape a scale or zero point so that it broadcasts along an axis of ``x``."""
    if parameter.dim() == 0:
        return parameter
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.view(shape)


OBSERVE = torch.ops.fxprune.observe.default
FAKE_QUANTIZE = torch.ops.fxprune.fake_quantize.default
QUANTIZE = torch.ops.fxprune.quantize.default
DEQUANTIZE = torch.ops.fxprune.dequantize.default
