"""A table of the times of single operators in ONNX Runtime on this host, in FP32 and in INT8.

Many operators share one session, and its profile gives the time of each. An operator's input is
written just before it runs, and sessions are about as large as a network's working set, so caches
behave as in a network. The costs of calling a session and of reordering its inputs are excluded.

``sweeps`` says how sessions are measured. The table of another machine, from a kit, has a file that
is only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import InputError
from fxprune.latency import cache as latency_cache
from fxprune.latency.cache import Host, Timing
from fxprune.latency.layer_config import ANCHORS, Form, LayerConfig
from fxprune.latency.machine import Neighbours, Network, read_machine
from fxprune.latency.sweeps import RUNS, SWEEPS, measure_session, start, sweep
from fxprune.latency.timed_model import Entry, model_of
from fxprune.onnx.benchmark import CPU
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker

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
        network: what the dense network took on the machine of a kit's file; None if this host is
            the machine.

    """

    host: Host
    path: Path | None
    times: dict[str, Timing] = field(default_factory=dict)
    used: set[Entry] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    network: Network | None = None

    @classmethod
    def of(cls, context: Context) -> Table:
        """Open the table that a run plans with: another machine's, or this host's.

        Raises:
            InputError: another machine's file cannot be read.

        """
        if context.latency_table is None:
            return cls.open(context.threads, provider=context.provider)
        host, times, network = read_machine(context.latency_table)
        note = (
            f"planned for another machine: {host.cpu}, ONNX Runtime {host.runtime}, "
            f"{host.provider}, {host.threads} thread{'s' * (host.threads > 1)}, by the table "
            f"{context.latency_table}; measured latencies in this report are of this host, and "
            "python kit.zip judge measures the model there"
        )
        return cls(host, None, times, notes=[note], network=network)

    @classmethod
    def open(cls, threads: int = 1, path: Path | None = None, provider: str = CPU) -> Table:
        """Open the table of this host, by default the one in the user's cache folder."""
        host = Host.here(threads, provider)
        path = path or host.path
        times, note = latency_cache.load(path)
        return cls(host, path, times, notes=[note] if note else [])

    def fill(
        self,
        configs: Iterable[LayerConfig],
        progress: Tracker | None = None,
        forms: Sequence[Form] = ("fp32",),
    ) -> int:
        """Measure the operators that the table lacks in the given forms; return their number.

        Another machine's table measures nothing: it interpolates.

        Raises:
            InputError: another machine's table lacks an operator, and all like it.

        """
        asked = {(one, form) for one in configs for form in forms if form in one.forms}
        self.used |= asked
        unknown = sorted(entry for entry in asked if key_of(entry) not in self.times)
        if not unknown:
            return 0
        if self.network is not None:
            self._interpolate(unknown)
            return 0
        fresh = self._anchors()
        missing = [entry for entry in unknown if entry not in ANCHOR_ENTRIES]
        parts = sessions(missing) * SWEEPS
        tracked = (progress or Tracker(shown=False)).track(
            parts, "measuring layers in ONNX Runtime", total=len(parts)
        )
        measures = (partial(measure, [*ANCHOR_ENTRIES, *part], self.host) for part in tracked)
        fresh |= sweep(measures, {key: self.times[key] for key in map(key_of, ANCHOR_ENTRIES)})
        self.times |= fresh
        if self.path is not None:
            note = latency_cache.save(self.path, self.host, fresh)
            self.notes += [note] if note else []
        return len(unknown)

    @cached_property
    def _neighbours(self) -> Neighbours:
        """What another machine's file has, without what was interpolated."""
        return Neighbours(self.times)

    def _interpolate(self, unknown: Sequence[Entry]) -> None:
        """Add what another machine's table lacks, between what it has.

        Raises:
            InputError: it has nothing like it.

        """
        found = {key: self._neighbours.timing(key) for key in map(key_of, unknown)}
        missing = [key for key, timing in found.items() if timing is None]
        if missing:
            raise InputError(
                f"the latency table has no time for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + "; it was made for another model or by another version of fxprune: make the kit "
                "again for this model, and measure the table again"
            )
        self.times |= {key: timing for key, timing in found.items() if timing is not None}

    def _anchors(self) -> dict[str, Timing]:
        """Measure the anchors if the table lacks them; return the new times."""
        keys = [key_of(entry) for entry in ANCHOR_ENTRIES]
        if all(key in self.times for key in keys):
            return {}
        fresh = start(partial(measure, ANCHOR_ENTRIES, self.host))
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
            "provider": self.host.provider,
        }


def key_of(entry: Entry) -> str:
    """Return the name of an operator in one form in the table."""
    config, form = entry
    return f"{form} {config.key}"


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


def measure(entries: Sequence[Entry], host: Host, runs: int = RUNS) -> dict[str, float]:
    """Time operators in one session: the mean microseconds of the faster half of runs, by key."""
    return measure_session(model_of(entries), list(map(key_of, entries)), host, runs)
