"""Compare predicted latencies with measured ones, and test latency budgets.

    python -m tools.latency_study [--only resnet20,resnet56] [--threads 1] [--fresh]

First, networks are pruned to given shares of the multiply-accumulates, and their predicted latency
is compared with the measured one, interleaved with the dense network. Then latency budgets are
planned for, and each planned network is exported and measured once more; predictions are scaled to
the dense latency of the study, because every plan measures it again. Weights are random; latency
does not depend on them. ``--fresh`` measures a new table in a separate cache folder (on systems
that use ``XDG_CACHE_HOME``).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fxprune
from fxprune.errors import BudgetError
from fxprune.graph.program import Program
from fxprune.latency.bench import Bench, open_bench
from fxprune.latency.table import Table
from fxprune.passes import AnnotateSensitivity, PlanChannels, RemoveChannels
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome
from tools.budget_study import NETWORKS

DEFAULT = "digits,resnet20,resnet56,mobilenet_v2"
SHARES = ("75%", "50%", "30%")
BUDGETS = ({"latency": "75%"}, {"latency": "60%"}, {"latency": "60%", "params": "50%"})
HEADS = ("network", "asked", "predicted ms", "measured ms", "error", "of the limit", "plans", "s")


def plan(program: Program, options: dict[str, str], threads: int) -> tuple[Program, Outcome]:
    """Plan and cut a copy."""
    context = Context(dense=program, threads=threads)
    small = program.copy()
    outcome = PlanChannels(**options)(small, context)  # type: ignore[arg-type]
    RemoveChannels()(small, context)
    return small, outcome


def cuts(program: Program, bench: Bench) -> Iterator[list[str]]:
    """Predict and measure cuts that were planned for their multiply-accumulates."""
    for share in SHARES:
        start = time.perf_counter()
        small, _ = plan(program, {"macs": share}, 1)
        predicted, measured = bench.predict(small), bench.measure(small)
        seconds = f"{time.perf_counter() - start:.0f}"
        yield [f"macs={share}", *_compared(predicted, measured), "", "", seconds]


def budgets(program: Program, bench: Bench) -> Iterator[list[str]]:
    """Plan for latencies, and measure what the plans leave once more."""
    for options in BUDGETS:
        asked, start = ",".join(f"{k}={v}" for k, v in options.items()), time.perf_counter()
        try:
            small, outcome = plan(program, options, bench.table.host.threads)
        except BudgetError as error:
            yield [asked, "refused", str(error), "", "", "", f"{time.perf_counter() - start:.0f}"]
            continue
        seconds = f"{time.perf_counter() - start:.0f}"
        told = outcome.details["latency"]
        share = float(options["latency"].rstrip("%")) / 100
        measured = bench.measure(small)
        used = f"{measured / (share * bench.dense_ms):.1%}"
        predicted = told["predicted_ms"] * bench.dense_ms / told["dense_ms"]
        yield [asked, *_compared(predicted, measured), used, str(told["plans"]), seconds]


def _compared(predicted: float, measured: float) -> list[str]:
    return [f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured - 1:+.1%}"]


def study(name: str, threads: int, folder: Path) -> Iterator[list[str]]:
    """Yield the rows of one network."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    program = fxprune.trace(network.make().eval(), (torch.randn(2, *network.shape),))
    AnnotateSensitivity(criterion="magnitude-l2")(program, Context())
    table = Table.open(threads)
    start = time.perf_counter()
    bench = open_bench(program.copy(), folder, table)
    seconds = f"{time.perf_counter() - start:.0f}"
    yield ["dense", f"{bench.predict(program):.3f}", f"{bench.dense_ms:.3f}", "", "", "", seconds]
    yield from cuts(program, bench)
    yield from budgets(program, bench)
    about = table.about(table.used)
    yield [f"{about['entries']} layers, noise {about['noise']:.1%}", *[""] * 6]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=DEFAULT, help="names of networks, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--fresh", action="store_true", help="measure a new table")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |{chr(10)}{'|---' * len(HEADS)}|")
    with tempfile.TemporaryDirectory() as cache:
        if options.fresh:
            os.environ["XDG_CACHE_HOME"] = cache
        for name in options.only.split(","):
            with tempfile.TemporaryDirectory() as folder:
                for row in study(name, options.threads, Path(folder)):
                    print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
