"""Observers and fake-quantisers of a program: insertion, calibration, and frozen scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxprune.calibration.stream import calibration_stream, record
from fxprune.graph.custom_ops import FAKE_QUANTIZE, OBSERVE
from fxprune.graph.facts import OBSERVED
from fxprune.graph.hooks import Call, Hook
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, read_tensor, replace_node, set_tensor
from fxprune.host import features
from fxprune.pipeline.context import Context
from fxprune.quantization.observers import Method, Observer, activation_scale, weight_scale
from fxprune.quantization.patterns import Placement, sums_exactly

ACTIVATION_RANGE = (0, 255)
WEIGHT_LIMIT = 127  # two neighbouring weights share it, with rounding: 255 * (127 + 1) < 2**15
SCALES_MODULE = "quantizers"  # prefix of the names of activations' scales


def sums_overflow() -> bool:
    """Whether this processor adds 8-bit products in 16 bits, as x86 without VNNI does."""
    found = features()
    return "avx2" in found and not any("vnni" in name or "int8" in name for name in found)


@dataclass(frozen=True)
class QuantizerSite:
    """One observer or fake-quantiser: a node, and its arguments by name."""

    node: fx.Node
    value: fx.Node
    key: str
    low: int
    high: int
    symmetric: bool
    axis: int


def observer_sites(program: Program) -> tuple[QuantizerSite, ...]:
    """Return all observers of a program, in graph order."""
    return tuple(
        QuantizerSite(node, *node.args) for node in program.graph.nodes if node.target is OBSERVE
    )


def observe(program: Program, placement: Placement) -> int:
    """Insert the observers of a placement; return their number."""
    for root, readers in placement.roots.items():
        key = placement.keys[root]
        before = root.next
        while before.op == "placeholder":  # inputs come before all calls
            before = before.next
        args = (root, key, *ACTIVATION_RANGE, False, -1)
        node = insert_call(program, before, OBSERVE, args)
        for reader in readers:
            reader.replace_input_with(root, node)
    weights: dict[int, fx.Node] = {}
    for layer in placement.layers:
        weight = layer.args[1]
        assert isinstance(weight, fx.Node)
        name = str(weight.target)
        stored = id(program.tensor(name))  # tied weights have several names
        if stored not in weights:
            given = (weight, name, -WEIGHT_LIMIT, WEIGHT_LIMIT, True, 0)
            weights[stored] = insert_call(program, layer, OBSERVE, given)
        layer.replace_input_with(weight, weights[stored])
    return len(placement.roots) + len(weights)


def calibrate(
    program: Program,
    context: Context,
    found: Iterable[QuantizerSite],
    method: Method,
    samples: int,
    batch_size: int,
) -> dict[str, Observer]:
    """Run calibration samples through a program; return the observers of activations by key."""
    observers = {site.key: Observer() for site in found if not site.symmetric}
    keys = {site.node: site.key for site in found if not site.symmetric}

    def extremes(call: Call) -> Any:
        observers[keys[call.node]].extremes(call.args[0])
        return call.value()

    def histogram(call: Call) -> Any:
        observers[keys[call.node]].add_to_histogram(call.args[0])
        return call.value()

    stream = calibration_stream(program, context, samples, batch_size)
    for hook in (extremes,) if method in ("minmax", "moving-average") else (extremes, histogram):
        record(program, context, stream, dict.fromkeys(keys, hook), "calibrating")
    return observers


def unrounding(program: Program) -> dict[fx.Node, Hook]:
    """Return hooks that make the fake-quantisers of a program return unrounded values."""
    nodes = [node for node in program.graph.nodes if node.target is FAKE_QUANTIZE]
    return dict.fromkeys(nodes, lambda call: call.args[0])


def freeze(
    program: Program,
    found: Sequence[QuantizerSite],
    observers: Mapping[str, Observer],
    method: Method,
    *,
    search_weights: bool = False,
) -> int:
    """Replace observers by fake-quantisers with the measured scales; return their number."""
    for site in found:
        names = names_of(site)
        for name, value in zip(
            names, _scale(program, site, observers, method, search_weights), strict=True
        ):
            set_tensor(program, name, value)
        read = [read_tensor(program, name, site.node) for name in names]
        args = (site.value, *read, site.low, site.high, site.axis)
        new = insert_call(program, site.node, FAKE_QUANTIZE, args)
        replace_node(program, site.node, new)
    return len(found)


def remeasure(
    program: Program, context: Context, method: Method, samples: int, batch_size: int
) -> None:
    """Measure the scales of fake-quantisers again, on current values, rounding included."""
    program.eval()
    found = fake_quantizer_sites(program)
    observers = calibrate(program, context, found, method, samples, batch_size)
    for site in found:
        for node, value in zip(
            site.node.args[1:3], _scale(program, site, observers, method, False), strict=True
        ):
            old = program.tensor(str(cast(fx.Node, node).target))
            with torch.no_grad():
                old.copy_(value)
    program.train()


def fake_quantizer_sites(program: Program) -> tuple[QuantizerSite, ...]:
    """Return all fake-quantisers of a program, in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.target is FAKE_QUANTIZE:
            value, scale, _, low, high, axis = cast(tuple[Any, ...], node.args)
            found.append(QuantizerSite(node, value, str(scale.target), low, high, axis != -1, axis))
    return tuple(found)


def _scale(
    program: Program,
    site: QuantizerSite,
    observers: Mapping[str, Observer],
    method: Method,
    search_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of a site."""
    if site.symmetric:
        weight = program.tensor(str(site.value.target))
        paired = program.get(OBSERVED).paired and not all(map(sums_exactly, site.node.users))
        scale = weight_scale(weight, site.high, site.axis, search=search_weights, paired=paired)
        return scale.detach(), torch.zeros_like(scale, dtype=torch.int8)
    span = observers[site.key].span(method, site.high - site.low + 1)
    step, zero = activation_scale(*span, (site.low, site.high))
    device = next(program.graph_module.parameters()).device
    return (
        torch.tensor(step, device=device),
        torch.tensor(zero, dtype=torch.uint8, device=device),
    )


def names_of(site: QuantizerSite) -> tuple[str, str]:
    """Return the names of an observer's scale and zero point."""
    if site.symmetric:
        return f"{site.key}_scale", f"{site.key}_zero_point"
    return f"{SCALES_MODULE}.{site.key}.scale", f"{SCALES_MODULE}.{site.key}.zero_point"
