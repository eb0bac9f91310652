"""Layers that rounding harms most, back to floating point until predictions are won back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.graph.facts import OBSERVED, Quantized
from fxprune.graph.program import Program
from fxprune.graph.surgery import replace_node
from fxprune.pipeline.context import Context
from fxprune.quantization.fake_quantizers import observe, sites
from fxprune.quantization.layer_costs import disagreement, rounding_costs, to_recover
from fxprune.quantization.patterns import is_chosen_alone, place, weight_name

ROUNDS = 3


@dataclass(frozen=True)
class Recovery:
    """What was left in floating point.

    Attributes:
        weights: the layers, by their weights, in the order in which they were chosen.
        costs: by weight, how much rounding in its layer alone raised the loss, dearest first.
        gaps: in how many of a hundred samples rounding changed the prediction, at first and after
            each round of layers.

    """

    weights: tuple[str, ...]
    costs: Mapping[str, float]
    gaps: tuple[float, ...]


def leave_in_floats(program: Program, weights: Collection[str]) -> int:
    """Place the observers of a program anew, without some layers; returns how many there are."""
    for site in sites(program):
        replace_node(program, site.node, site.value)
    quantized = program.get(OBSERVED)
    doomed = {id(program.tensor(name)) for name in weights}
    kept = frozenset(
        node
        for node in program.graph.nodes
        if (node.name in quantized.layers and id(program.tensor(weight_name(node))) not in doomed)
        or (node.name in quantized.others and is_chosen_alone(node))
    )
    placement = place(program, kept)
    layers = {node.name: weight_name(node) for node in placement.layers}
    others = tuple(node.name for node in placement.others)
    count = observe(program, placement)
    program.put(OBSERVED, Quantized(layers, others, quantized.paired))
    return count


def recover(
    program: Program,
    context: Context,
    points: float,
    calibrate: Callable[[Program], Any],
    samples: int,
    batch_size: int,
) -> Recovery:
    """Leave the dearest layers of an observed program in floats, to win back so many points.

    Args:
        program: with observers, which are placed anew.
        context: for samples.
        points: of agreement with the unrounded program, in a hundred predictions.
        calibrate: turns the observers of a copy into fake-quantisers.
        samples: calibration samples at most.
        batch_size: samples per step.

    """
    weights: list[str] = []
    gaps: list[float] = []
    first: Mapping[str, float] = {}
    while True:
        trial = program.copy()
        calibrate(trial)
        gaps.append(disagreement(trial, context, samples, batch_size))
        wanted = points - (gaps[0] - gaps[-1])
        if gaps[-1] == 0 or wanted <= 0 or len(gaps) > ROUNDS:
            break
        costs = rounding_costs(trial, context, samples, batch_size)
        first = first or costs
        chosen = to_recover(costs, wanted, gaps[-1])
        if not chosen:
            break
        weights += chosen
        leave_in_floats(program, weights)
    return Recovery(tuple(weights), first, tuple(gaps))
