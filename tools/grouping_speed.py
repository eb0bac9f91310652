"""Compare the time to find groups with tracing, and with Torch-Pruning on models it supports.

    pip install --no-deps torch-pruning
    python -m tools.grouping_speed [--suite torchvision] [--repeats 3] [--seconds 120]

Torch-Pruning builds its dependency graph, which runs the model, and lists its groups; fxprune finds
groups in a traced program. Both are timed in turns, in one process, on one thread, in processor
time; the fastest repeat counts. The time of tracing is listed separately. Models on which
Torch-Pruning fails or exceeds the time limit are named.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import fxprune
from tools.coverage_models import build, load_zoo, suites


def main() -> None:
    """Print a line for each model, then medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="torchvision", choices=sorted(suites()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=int, default=120, help="time limit of Torch-Pruning per model"
    )
    options = parser.parse_args()
    try:
        peer = importlib.import_module("torch_pruning")
    except ImportError:
        sys.exit("torch_pruning is not installed: pip install --no-deps torch-pruning")
    torch.set_num_threads(1)
    load_zoo(options.suite)
    print(f"{'model':32} {'trace':>7} {'groups':>7} {'peer':>7}  groups/trace  groups/peer")
    to_trace, to_peer = [], []
    for name in suites()[options.suite]():
        model, inputs = build(options.suite, name)
        start = time.process_time()
        program = fxprune.trace(model, inputs)
        traced = time.process_time() - start
        ours, theirs, failure = [], [], ""
        for _ in range(options.repeats):
            ours.append(_seconds(partial(fxprune.find_groups, program)))
            if not failure:
                try:
                    with _limit(options.seconds):
                        theirs.append(_seconds(partial(_list, peer, model, inputs)))
                except Exception as error:  # whatever a peer raises is its result
                    failure = f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:60]
        to_trace.append(min(ours) / traced)
        shown = f"{name:32} {traced:7.2f} {min(ours):7.2f}"
        if failure:
            print(f"{shown}       -  {to_trace[-1]:12.2f}  {failure}", flush=True)
            continue
        to_peer.append(min(ours) / min(theirs))
        print(f"{shown} {min(theirs):7.2f}  {to_trace[-1]:12.2f} {to_peer[-1]:12.2f}", flush=True)
    print(f"median groups/trace {statistics.median(to_trace):.2f} over {len(to_trace)} models")
    if to_peer:
        print(f"median groups/peer  {statistics.median(to_peer):.2f} over {len(to_peer)} models")


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _list(peer: Any, model: torch.nn.Module, inputs: tuple[Any, ...]) -> int:
    graph = peer.DependencyGraph().build_dependency(model, example_inputs=inputs[0])
    return sum(1 for _ in graph.get_all_groups())


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
