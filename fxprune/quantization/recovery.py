"""Keeping layers in FP32, those with the costliest rounding first, until predictions recover."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.graph.facts import OBSERVED, Quantized
from fxprune.graph.program import Program
from fxprune.graph.surgery import replace_node
from fxprune.pipeline.context import Context
from fxprune.quantization.fake_quantizers import observe, observer_sites
from fxprune.quantization.layer_costs import disagreement, rounding_costs, to_recover
from fxprune.quantization.patterns import is_chosen_alone, place, weight_name

MAX_ROUNDS = 3


@dataclass(frozen=True)
class Recovery:
    """The layers that stay in FP32.

    Attributes:
        weights: the names of their weights, in the order in which they were chosen.
        costs: by weight, the rise in loss that rounding in its layer alone causes, largest first.
        gaps: the percentage of samples whose prediction rounding changes, at first and after each
            round.

    """

    weights: tuple[str, ...]
    costs: Mapping[str, float]
    gaps: tuple[float, ...]


def keep_in_fp32(program: Program, weights: Collection[str]) -> int:
    """Place the observers of a program again, without some layers; return their number."""
    for site in observer_sites(program):
        replace_node(program, site.node, site.value)
    quantized = program.get(OBSERVED)
    unquantized = {id(program.tensor(name)) for name in weights}
    kept = frozenset(
        node
        for node in program.graph.nodes
        if (
            node.name in quantized.layers
            and id(program.tensor(weight_name(node))) not in unquantized
        )
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
    """Keep the layers with the costliest rounding in FP32, to recover so many percentage points.

    Args:
        program: a program with observers, which are placed again.
        context: calibration samples, device and seed.
        points: agreement with the unrounded program to recover, in percentage points.
        calibrate: turns the observers of a copy into fake-quantisers.
        samples: largest number of calibration samples.
        batch_size: samples per batch.

    """
    weights: list[str] = []
    gaps: list[float] = []
    first: Mapping[str, float] = {}
    while True:
        trial = program.copy()
        calibrate(trial)
        gaps.append(disagreement(trial, context, samples, batch_size))
        wanted = points - (gaps[0] - gaps[-1])
        if gaps[-1] == 0 or wanted <= 0 or len(gaps) > MAX_ROUNDS:
            break
        costs = rounding_costs(trial, context, samples, batch_size)
        first = first or costs
        chosen = to_recover(costs, wanted, gaps[-1])
        if not chosen:
            break
        weights += chosen
        keep_in_fp32(program, weights)
    return Recovery(tuple(weights), first, tuple(gaps))
