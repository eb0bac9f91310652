"""Where PyTorch's own modules do otherwise while they are captured than when they are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer


@contextmanager
def captured_as_called(model: nn.Module) -> Iterator[None]:
    """Let ``torch.export`` see what a call of the model computes.

    - ``tensor.data`` is read as a view and written as a copy; export would drop the write.
    - Transformers do not look whether their mask is a causal one, which depends on its values; the
      mask itself says the same.
    - Encoders give zeros at padded positions where their fast path, which is not captured, does.
    """
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "data", property(_read, _write), create=True))
        stack.enter_context(
            mock.patch.object(transformer, "_detect_is_causal_mask", _said_to_be_causal)
        )
        for encoder in encoders:
            stack.enter_context(_padding_zeroed(encoder))
        yield


def _read(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _said_to_be_causal(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
    return is_causal is True


@contextmanager
def _padding_zeroed(encoder: nn.TransformerEncoder) -> Iterator[None]:
    """Fill the padded positions of the last layer's output with zeros, as the fast path does."""
    padding: list[Tensor | None] = []
    nested = bool(getattr(encoder, "use_nested_tensor", False))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(encoder.forward).bind(*args, **kwargs).arguments
        padding[:] = [_dropped(encoder, given) if nested else None]

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        dropped = padding[0]
        return output if dropped is None else output.masked_fill(dropped[..., None], 0)

    handles = [
        encoder.register_forward_pre_hook(before, with_kwargs=True),
        encoder.layers[-1].register_forward_hook(after),
    ]
    try:
        with mock.patch.object(encoder, "use_nested_tensor", False, create=True):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _dropped(encoder: nn.TransformerEncoder, given: dict[str, Any]) -> Tensor | None:
    """Return which positions, ``(batch, places)``, the fast path drops; None if it is not taken.

    Unless ``mask_check`` is off, it is taken only if the padding of every sample is at its end.
    """
    padded = given.get("src_key_padding_mask")
    fast = (
        torch.backends.mha.get_fastpath_enabled()
        and not encoder.layers[0].training
        and given["src"].dim() == 3
        and given.get("mask") is None
    )
    if padded is None or not fast:
        return None
    padded = cast(Tensor, padded).bool()
    if not getattr(encoder, "mask_check", True):
        return padded
    at_end = (padded[:, 1:] | ~padded[:, :-1]).all()
    return padded & at_end
