"""Profile a model in ONNX Runtime: the time of every node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fxprune.onnx.benchmark import CPU, Shapes, open_session, random_inputs

WARM_UP = 2


@dataclass(frozen=True)
class Profiled:
    """The profile of one node: its operator, and the microseconds of every run."""

    operator: str
    times: tuple[float, ...]

    @property
    def us(self) -> float:
        """The mean of the faster half: other processes only ever add to the times."""
        return float(np.mean(sorted(self.times)[: (len(self.times) + 1) // 2]))


def profile(
    model: bytes | str | Path,
    threads: int,
    runs: int,
    scratch: Path,
    *,
    provider: str = CPU,
    shapes: Shapes | None = None,
) -> Mapping[str, Profiled]:
    """Run a model ``runs`` times in ONNX Runtime; return the times of its nodes, by name."""
    session = open_session(model, threads, profile_to=scratch / "profile", provider=provider)
    feeds = random_inputs(session, 1, shapes)
    for _ in range(WARM_UP + runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    operators: dict[str, str] = {}
    suffix = "_kernel_time"
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            name = event["name"].removesuffix(suffix)
            # The profile drops fractions of a microsecond; their mean is one half.
            times.setdefault(name, []).append(float(event["dur"]) + 0.5)
            operators[name] = event["args"]["op_name"]
    return {
        name: Profiled(operators[name], tuple(own[WARM_UP * len(own) // (WARM_UP + runs) :]))
        for name, own in times.items()
    }
