"""Scales as parameters, for as long as they are learned (arXiv 1902.08153)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.program import Program, owner_of, shape_of
from fxprune.quantization.fake_quantizers import Site, fakes
from fxprune.quantization.observers import HAIR
from fxprune.quantization.patterns import aten

SMALLEST = 1e-8


@contextmanager
def learned_scales(program: Program) -> Iterator[None]:
    """Make all scales parameters; afterwards they are buffers again, positive and in range.

    Their gradients are divided by ``sqrt(values per scale * highest code)``, so that a step moves
    a scale about as much, relative to its size, as it moves weights.
    """
    found = {site.node.args[1].target: site for site in fakes(program)}  # type: ignore[union-attr]
    hooks = []
    for name, site in found.items():
        scale = _register(program, str(name), parameter=True)
        hooks.append(scale.register_hook(_damped(_damping(site))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, site in found.items():
            scale = _register(program, str(name), parameter=False)
            scale.abs_().clamp_(min=SMALLEST, max=_ceiling(site))


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


def _damping(site: Site) -> float:
    shape = shape_of(site.value)
    values = math.prod(shape[1:])  # per sample, or per output channel
    return 1 / math.sqrt(max(values, 1) * site.high)


def _damped(factor: float) -> Any:
    return lambda gradient: gradient * factor


def _ceiling(site: Site) -> float:
    """The largest scale at which the clamp before a site changes nothing that has a code."""
    top: float | None = None
    match packet_of(site.value):
        case aten.relu6:
            top = 6.0
        case aten.hardtanh:
            top = argument(site.value, "max_val")
        case aten.clamp:
            top = argument(site.value, "max")
    return math.inf if top is None else float(top) * HAIR / (site.high - site.low)
