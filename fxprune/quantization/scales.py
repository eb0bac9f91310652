"""Scales as parameters while they are trained (arXiv 1902.08153)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.program import Program, owner_of, shape_of
from fxprune.quantization.fake_quantizers import QuantizerSite, fake_quantizer_sites
from fxprune.quantization.observers import BELOW_ONE
from fxprune.quantization.patterns import aten

MIN_SCALE = 1e-8


@contextmanager
def learned_scales(program: Program) -> Iterator[None]:
    """Make all scales parameters; afterwards they are buffers again, positive and in range.

    Their gradients are divided by ``sqrt(values per scale * largest integer)``, so that a step
    changes a scale about as much, relative to its size, as it changes weights.
    """
    found = {site.node.args[1].target: site for site in fake_quantizer_sites(program)}  # type: ignore[union-attr]
    hooks = []
    for name, site in found.items():
        scale = _register(program, str(name), parameter=True)
        values = math.prod(shape_of(site.value)[1:])  # per sample, or per output channel
        factor = 1 / math.sqrt(max(values, 1) * site.high)
        hooks.append(scale.register_hook(functools.partial(operator.mul, factor)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, site in found.items():
            scale = _register(program, str(name), parameter=False)
            scale.abs_().clamp_(min=MIN_SCALE, max=_ceiling(site))


def _register(program: Program, name: str, *, parameter: bool) -> torch.Tensor:
    """Turn a buffer into a parameter of the same name, or back."""
    owner, leaf = owner_of(program.graph_module, name)
    value = program.tensor(name).detach().clone()
    delattr(owner, leaf)
    if parameter:
        owner.register_parameter(leaf, nn.Parameter(value))
    else:
        owner.register_buffer(leaf, value)
    return program.tensor(name)


def _ceiling(site: QuantizerSite) -> float:
    """The largest scale whose range does not exceed the clamp before a site."""
    top: float | None = None
    match packet_of(site.value):
        case aten.relu6:
            top = 6.0
        case aten.hardtanh:
            top = argument(site.value, "max_val")
        case aten.clamp:
            top = argument(site.value, "max")
    return math.inf if top is None else float(top) * BELOW_ONE / (site.high - site.low)
