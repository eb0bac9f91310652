"""A table of the times of single operators in ONNX Runtime on this host, in FP32 and in INT8.

Many operators share one session, and its profile gives the time of each. An operator's input is
written just before it runs, and sessions are about as large as a network's working set, so caches
behave as in a network. The costs of calling a session and of reordering its inputs are excluded.

A host's clock changes over time. Every session runs the same few layers, the anchors, and its times
are scaled so that the anchors take as long as when the table was started.
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
from fxprune.latency.layer_config import ANCHORS, Form, LayerConfig
from fxprune.latency.timed_model import Entry, model_of, time_of
from fxprune.onnx.profile import profile
from fxprune.pipeline.progress import Tracker

RUNS = 8
SWEEPS = 3
SESSION_BYTES = 8 * 2**20  # of weights and activations in one session, about what caches hold
ANCHOR_ENTRIES: tuple[Entry, ...] = tuple((one, "fp32") for one in ANCHORS)


@dataclass(eq=False)
class Table:
    """Times of operators on one host; missing times are measured on demand.

    Attributes:
        host: the host of the times.
        path: file to store the times in; None stores nothing.
        times: by form and ``LayerConfig.key``.
        used: the entries used since the table was opened.
        notes: remarks on the file, for the report.

    """

    host: Host
    path: Path | None
    times: dict[str, Timing] = field(default_factory=dict)
    used: set[Entry] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, threads: int = 1, path: Path | None = None) -> Table:
        """Open the table of this host, by default the one in the user's cache folder."""
        host = Host.here(threads)
        path = path or host.path
        times, note = latency_cache.load(path)
        return cls(host, path, times, notes=[note] if note else [])

    def fill(
        self,
        configs: Iterable[LayerConfig],
        progress: Tracker | None = None,
        forms: Sequence[Form] = ("fp32",),
    ) -> int:
        """Measure the operators that the table lacks in the given forms; return their number."""
        asked = {(one, form) for one in configs for form in forms if form in one.forms}
        self.used |= asked
        unknown = sorted(entry for entry in asked if key_of(entry) not in self.times)
        if not unknown:
            return 0
        fresh = self._anchors()
        missing = [entry for entry in unknown if entry not in ANCHOR_ENTRIES]
        parts = sessions(missing) * SWEEPS
        tracked = (progress or Tracker(shown=False)).track(
            parts, "measuring layers in ONNX Runtime", total=len(parts)
        )
        found: dict[str, list[float]] = {}
        for part in tracked:
            times = measure([*ANCHOR_ENTRIES, *part], self.host.threads)
            anchors = map(key_of, ANCHOR_ENTRIES)
            drift = np.median([self.times[key].us / times[key] for key in anchors])
            for key in map(key_of, part):
                found.setdefault(key, []).append(float(drift * times[key]))
        fresh |= _timings(found)
        self.times |= fresh
        if self.path is not None:
            note = latency_cache.save(self.path, self.host, fresh)
            self.notes += [note] if note else []
        return len(unknown)

    def _anchors(self) -> dict[str, Timing]:
        """Measure the anchors if the table lacks them; return the new times."""
        keys = [key_of(entry) for entry in ANCHOR_ENTRIES]
        if all(key in self.times for key in keys):
            return {}
        sweeps = [measure(ANCHOR_ENTRIES, self.host.threads) for _ in range(SWEEPS)]
        fresh = _timings({key: [sweep[key] for sweep in sweeps] for key in keys})
        self.times |= fresh
        return fresh

    def us(self, configs: Sequence[LayerConfig], form: Form = "fp32") -> Any:
        """Return the microseconds of operators that are in the table, as an array."""
        return np.array([self.times[key_of((one, form))].us for one in configs])

    def ms(self, config: LayerConfig, form: Form = "fp32") -> float:
        """Return the milliseconds of an operator that is in the table.

        Raises:
            KeyError: the table has no such time; ``fill`` measures it.

        """
        return self.times[key_of((config, form))].us / 1e3

    def about(self, entries: Iterable[Entry]) -> dict[str, float | int | str]:
        """Return the number, age and noise of the entries used, for the report."""
        used = {key: self.times[key] for key in map(key_of, entries)}
        noise = float(np.median([one.spread for one in used.values()])) if used else 0.0
        return {
            "entries": len(used),
            "oldest_days": round(latency_cache.age(used), 2),
            "noise": round(noise, 4),
            "cpu": self.host.cpu,
            "onnxruntime": self.host.runtime,
            "threads": self.host.threads,
        }


def key_of(entry: Entry) -> str:
    """Return the name of an operator in one form in the table."""
    config, form = entry
    return f"{form} {config.key}"


def _timings(found: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    now = time.time()
    return {
        key: Timing(float(np.median(us)), (max(us) - min(us)) / min(us), now)
        for key, us in found.items()
    }


def sessions(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Split entries into parts that fit a session."""
    parts: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = 4 * entry[0].elements
        if size > room:
            parts.append([])
            room = SESSION_BYTES
        parts[-1].append(entry)
        room -= size
    return parts


def measure(entries: Sequence[Entry], threads: int, runs: int = RUNS) -> dict[str, float]:
    """Time operators in one session: the mean microseconds of the faster half of runs, by key."""
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        profiled = profile(model_of(entries), threads, runs, Path(scratch))
    found = {}
    for number, entry in enumerate(entries):
        us = time_of(profiled, number)
        if us is None:
            raise FxpruneError(
                f"ONNX Runtime's profile has no time for {key_of(entry)}; this is a bug: please "
                "report it"
            )
        found[key_of(entry)] = us
    return found
