"""A table of how long ONNX Runtime takes for single layers on this host.

Many layers share a session whose profile tells the time of each. A layer's input is written just
before it runs, and the sessions are about as large as a network's working set, so caches are as
they would be in a network. Costs of calling a session and of reordering its inputs are left out.

A host's clock is not the same at all times. Every session runs a few layers that are the same in
all of them, the anchors, and its times are scaled to what those took when the table was begun.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import FxpruneError
from fxprune.latency import cache as latency_cache
from fxprune.latency.cache import Host, Timing
from fxprune.latency.layer_config import ANCHORS, Shape, model_of
from fxprune.onnx.profile import profile
from fxprune.pipeline.progress import Tracker

RUNS = 8
SWEEPS = 3
SESSION_BYTES = 8 * 2**20  # of weights and activations in one session, about what caches hold


@dataclass(eq=False)
class Table:
    """Times of layers on one host; what is missing is measured on demand.

    Attributes:
        host: whose times they are.
        path: where they are kept; None keeps nothing.
        times: by ``Shape.key``.
        used: what was asked for since the table was opened.
        notes: what the report should tell about the file.

    """

    host: Host
    path: Path | None
    times: dict[str, Timing] = field(default_factory=dict)
    used: set[Shape] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, threads: int = 1, path: Path | None = None) -> Table:
        """Open the table of this host, by default the one in the user's cache folder."""
        host = Host.here(threads)
        path = path or host.path
        times, note = latency_cache.load(path)
        return cls(host, path, times, notes=[note] if note else [])

    def fill(self, shapes: Iterable[Shape], progress: Tracker | None = None) -> int:
        """Measure those of the shapes that are not in the table; return how many."""
        asked = set(shapes)
        self.used |= asked
        unknown = sorted(shape for shape in asked if shape.key not in self.times)
        if not unknown:
            return 0
        fresh = self._anchors()
        missing = [shape for shape in unknown if shape not in ANCHORS]
        parts = sessions(missing) * SWEEPS
        tracked = (progress or Tracker(shown=False)).track(
            parts, "measuring layers in ONNX Runtime", total=len(parts)
        )
        found: dict[str, list[float]] = {}
        for part in tracked:
            times = measure([*ANCHORS, *part], self.host.threads)
            drift = np.median([self.times[one.key].us / times[one.key] for one in ANCHORS])
            for shape in part:
                found.setdefault(shape.key, []).append(float(drift * times[shape.key]))
        fresh |= _timings(found)
        self.times |= fresh
        if self.path is not None:
            note = latency_cache.save(self.path, self.host, fresh)
            self.notes += [note] if note else []
        return len(unknown)

    def _anchors(self) -> dict[str, Timing]:
        """Begin the table with the times of the anchors; return those that it did not have."""
        if all(one.key in self.times for one in ANCHORS):
            return {}
        sweeps = [measure(ANCHORS, self.host.threads) for _ in range(SWEEPS)]
        fresh = _timings({one.key: [sweep[one.key] for sweep in sweeps] for one in ANCHORS})
        self.times |= fresh
        return fresh

    def us(self, shapes: Sequence[Shape]) -> Any:
        """Return the microseconds of shapes that are in the table, as an array."""
        return np.array([self.times[shape.key].us for shape in shapes])

    def about(self, shapes: Iterable[Shape]) -> dict[str, float | int | str]:
        """Tell the number, age and noise of the entries used, for the report."""
        used = {shape.key: self.times[shape.key] for shape in shapes}
        noise = float(np.median([one.spread for one in used.values()])) if used else 0.0
        return {
            "entries": len(used),
            "oldest_days": round(latency_cache.age(used), 2),
            "noise": round(noise, 4),
            "cpu": self.host.cpu,
            "onnxruntime": self.host.runtime,
            "threads": self.host.threads,
        }


def _timings(found: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    now = time.time()
    return {
        key: Timing(float(np.median(us)), (max(us) - min(us)) / min(us), now)
        for key, us in found.items()
    }


def sessions(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Split shapes into parts that fit a session."""
    parts: list[list[Shape]] = []
    room = 0
    for shape in shapes:
        size = 4 * shape.elements
        if size > room:
            parts.append([])
            room = SESSION_BYTES
        parts[-1].append(shape)
        room -= size
    return parts


def measure(shapes: Sequence[Shape], threads: int, runs: int = RUNS) -> dict[str, float]:
    """Time layers in one session: the mean microseconds of the faster half of runs."""
    model = model_of(shapes)
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        profiled = profile(model, threads, runs, Path(scratch))
    found = {}
    for number, shape in enumerate(shapes):
        names = (f"layer{number}", f"layer{number}_nchwc")
        layer = next((profiled[name] for name in names if name in profiled), None)
        if layer is None:
            raise FxpruneError(
                f"ONNX Runtime's profile has no time for the layer {shape.key}; please report it"
            )
        found[shape.key] = layer.us
    return found
