"""Compare the speed of sensitivities with that of a plain loop, in one interleaved run.

    python -m tools.sensitivity_speed --weights resnet32.pt --arch pkg:factory --data train.npz

The plain loop is how the method is usually written: for every probe the gradient's graph is built
again, multiplied with random signs by a second backward pass, and every channel's share is added up
in Python. It runs the same graph on the same batch. It is compared with the same product with the
graph kept and all units summed at once (``weights``), probes on the outputs (``outputs``), and no
probes at all (``exact``). The last part compares the lowest half of the units, by each method, with
that of a long run of output probes. Seconds are of processor time on one thread, so that other work
on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxprune import find_groups
from fxprune.data.batches import Batch, batches
from fxprune.data.roles import Data
from fxprune.graph.program import Program
from fxprune.pipeline.context import Context
from fxprune.sensitivity.model import Objective, Weights
from fxprune.sensitivity.probes import TraceProbes
from fxprune.sensitivity.scores import SensitivitySettings, measure
from fxprune.sensitivity.units import UnitLayout
from tools.study_models import load_data, load_program


def plain_loop(program: Program, layout: UnitLayout, batch: Batch, probes: int) -> list[float]:
    """Return the trace of every unit, the usual way."""
    parameters = {name: program.tensor(name).requires_grad_() for name in layout.labels}
    places = [
        (unit, name, dim, index)
        for name, dims in layout.labels.items()
        for dim, units in dims.items()
        for index, unit in enumerate(units.tolist())
        if unit >= 0
    ]
    objective, totals = Objective(F.cross_entropy), [0.0] * len(layout)
    for _ in range(probes):
        loss = objective(program(*batch.inputs), batch.target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        signs = [torch.randint(2, p.shape) * 2.0 - 1 for p in parameters.values()]
        products = torch.autograd.grad(gradients, list(parameters.values()), signs)
        shares = {
            name: product * sign
            for name, product, sign in zip(parameters, products, signs, strict=True)
        }
        for unit, name, dim, index in places:
            totals[unit] += float(shares[name].select(dim, index).sum()) / probes
    return totals


def ours(probes: TraceProbes, batch: Batch, count: int) -> Tensor:
    """Return the same traces by the package's probes."""
    sample = probes.prepare(batch, torch.Generator())
    draw: Callable[[Tensor], Tensor] = lambda like: torch.randint(2, like.shape) * 2.0 - 1  # noqa: E731
    total = torch.zeros(len(probes.layout), dtype=torch.float64)
    for _ in range(count):
        total += sample(draw) / count
    return total


def paired(program: Program, batch: Batch, probes: int, rounds: int) -> dict[str, list[float]]:
    """Time the three ways in turn, several times over."""
    layout = UnitLayout.of(program, find_groups(program))
    weights = Weights.of(program, list(layout.labels))
    objective = Objective(F.cross_entropy)
    made = {
        outputs: TraceProbes(program, layout, weights, objective, "hessian", outputs)
        for outputs in (False, True)
    }
    seconds: dict[str, list[float]] = {"plain loop": [], "weights": [], "outputs": []}
    for number in range(rounds + 1):  # the first round warms up
        ways: tuple[tuple[str, Callable[[], object]], ...] = (
            ("plain loop", lambda: plain_loop(program, layout, batch, probes)),
            ("weights", lambda: ours(made[False], batch, probes)),
            ("outputs", lambda: ours(made[True], batch, probes)),
        )
        for name, way in ways:
            start = time.process_time()
            way()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def overlap(one: Tensor, other: Tensor, cut: float = 0.5) -> float:
    """Return the share of the lowest units by one score that are lowest by the other."""
    number = round(cut * len(one))
    return float(torch.isin(one.argsort()[:number], other.argsort()[:number]).float().mean())


def settled(program: Program, context: Context, samples: int, size: int) -> dict[str, object]:
    """Compare the stopped and the exact ranking with one of a thousand probes."""
    groups = find_groups(program)

    def run(estimator: Any, **rule: Any) -> tuple[Tensor, float, object]:
        settings = SensitivitySettings(
            "hessian-trace", samples=samples, batch_size=size, estimator=estimator, **rule
        )
        start = time.process_time()
        found, layout, _ = measure(program, groups, settings, context)
        return layout.joined(found.scores), time.process_time() - start, found.details["probes"]

    truth, long, _ = run("outputs", probes=1000, tolerance=0)
    results: dict[str, object] = {"thousand output probes": {"seconds": long}}
    for name in ("exact", "outputs"):
        scores, seconds, count = run(name, probes=1000)
        results[f"{name}, stopped"] = {
            "seconds": seconds,
            "probes": count,
            "overlap": overlap(scores, truth),
        }
    few, seconds, _ = run("weights", probes=64, tolerance=0)
    results["weights, 64 probes"] = {"seconds": seconds, "overlap": overlap(few, truth)}
    return results


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--arch", required=True, help="package.module:factory, or path.py:factory")
    parser.add_argument("--argument", type=int, help="argument of the factory")
    parser.add_argument("--data", type=Path, required=True, help=".npz with x (uint8 NHWC) and y")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--probes", type=int, default=4, help="probes per timing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ranking", action="store_true", help="also compute the ranking by 1,000 probes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(options.data)
    program = load_program(options.arch, options.argument, options.weights, data)
    batch = next(iter(batches(data, options.batch_size, seed=0, limit=options.batch_size)))
    seconds = paired(program, batch, options.probes, options.rounds)
    best = {name: min(times) / options.probes for name, times in seconds.items()}
    figures: dict[str, object] = {
        "seconds per probe": best,
        "times faster": {name: best["plain loop"] / one for name, one in best.items()},
    }
    if options.ranking:
        context = Context(data=Data(data))
        figures["ranking"] = settled(program, context, options.samples, options.batch_size)
        figures["plain loop, seconds for 1000 probes"] = (
            1000 * best["plain loop"] * options.samples / options.batch_size
        )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
