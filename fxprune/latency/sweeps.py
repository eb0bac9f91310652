"""How operators of the latency table are timed: sessions in sweeps, with a few in common.

A host's clock changes over time. Every session runs the same few operators, the anchors, and its
times are scaled so that these take as long as when the table was started.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fxprune.errors import FxpruneError
from fxprune.latency.cache import Host, Timing
from fxprune.onnx.profile import Profiled, profile

RUNS = 8
SWEEPS = 3
Measure = Callable[[], Mapping[str, float]]  # microseconds of a session's operators, by key


def start(measure: Measure) -> dict[str, Timing]:
    """Return the times of the anchors, from a session of these alone."""
    sweeps = [measure() for _ in range(SWEEPS)]
    return timings({key: [sweep[key] for sweep in sweeps] for key in sweeps[0]})


def sweep(parts: Iterable[Measure], anchors: Mapping[str, Timing]) -> dict[str, Timing]:
    """Measure sessions; return the times of their operators at the pace of the anchors' times.

    Args:
        parts: every session, as often as it is measured; each has the anchors too.
        anchors: times of the anchors.

    """
    found: dict[str, list[float]] = {}
    for part in parts:
        times = part()
        drift = np.median([one.us / times[key] for key, one in anchors.items()])
        for key in times.keys() - anchors.keys():
            found.setdefault(key, []).append(float(drift * times[key]))
    return timings(found)


def timings(found: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Sum up the microseconds of several sweeps."""
    now = time.time()
    return {
        key: Timing(float(np.median(us)), (max(us) - min(us)) / min(us), now)
        for key, us in found.items()
    }


def measure_session(
    model: bytes, keys: Sequence[str], host: Host, runs: int = RUNS
) -> dict[str, float]:
    """Time the operators of one session: the mean microseconds of the faster half of runs.

    Args:
        model: as ``latency.timed_model`` makes it.
        keys: of its operators in order.
        host: whose threads and provider are used.
        runs: how often the session runs.

    """
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        profiled = profile(model, host.threads, runs, Path(scratch), provider=host.provider)
    found = {}
    for number, key in enumerate(keys):
        us = time_of(profiled, number)
        if us is None:
            raise FxpruneError(
                f"ONNX Runtime's profile has no time for {key} with {host.provider}; another "
                "provider, such as CPUExecutionProvider, gives one"
            )
        found[key] = us
    return found


def time_of(profiled: Mapping[str, Profiled], number: int) -> float | None:
    """Return the microseconds of one entry: its nodes, which optimisers may have given suffixes."""
    name = f"layer{number}"
    own = [node.us for key, node in profiled.items() if key == name or key.startswith(f"{name}_")]
    return sum(own) if own else None
