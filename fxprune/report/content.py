"""The report of a run: what was won and lost, every number measured in that run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from fxprune.host import processor
from fxprune.pipeline.contract import ReportTable
from fxprune.pipeline.driver import Entry
from fxprune.planning.budget import Target
from fxprune.planning.search import Trial
from fxprune.report.precision import Precision

TARGET_TOLERANCE = 0.01  # a target is met within one per cent
LATENCY_TOLERANCE = 0.05  # two runs of one model differ by as much


@dataclass(frozen=True)
class Measures:
    """One model's figures; None where not measured.

    Attributes:
        params: elements of all parameters.
        macs: multiply-accumulates per sample.
        weight_bytes: bytes of parameters and buffers.
        onnx_bytes: size of the ONNX file.
        latency_ms: median of one sample in ONNX Runtime.
        accuracy: share of right predictions, from 0 to 1, over the whole evaluation data.

    """

    params: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    onnx_bytes: int | None = None
    latency_ms: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Check:
    """A check, and whether it ran at all.

    Attributes:
        ran: false means that nothing is known.
        passed: None if it did not run.
        value: what was found; at most ``limit`` passes.
        limit: the largest value that passes.
        note: why it did not run, or what it covered.

    """

    ran: bool
    passed: bool | None = None
    value: float | None = None
    limit: float | None = None
    note: str | None = None

    @classmethod
    def of(cls, value: float, limit: float, note: str | None = None) -> Check:
        """Return a check that ran."""
        return cls(True, bool(value <= limit), value, limit, note)

    @classmethod
    def skipped(cls, why: str) -> Check:
        """Return a check that did not run."""
        return cls(False, note=why)


@dataclass(frozen=True)
class GroupEntry:
    """What became of one group's units."""

    name: str
    slots: tuple[str, ...]
    units: int
    removed: int = 0
    implanted: int = 0
    frozen_because: str | None = None


@dataclass(frozen=True)
class TargetEntry:
    """One target: ``value`` at most ``limit``, to within ``tolerance``, meets it.

    Attributes:
        target: as text.
        limit: the largest value allowed; of the dense model as measured in the same run.
        value: the small model's.
        met: whether it is kept to.
        tolerance: the share by which the limit may be exceeded: one per cent of what is counted,
            five of latencies, whose measurement is no better.
        predicted: the value that the plan expected.

    """

    target: str
    limit: float
    value: float
    met: bool
    tolerance: float = TARGET_TOLERANCE
    predicted: float | None = None

    @classmethod
    def of(
        cls, target: Target, before: Measures, after: Measures, predicted: float | None
    ) -> TargetEntry:
        """Hold the small model's figures against a target."""
        value, dense = getattr(after, target.quantity), getattr(before, target.quantity)
        value = math.nan if value is None else value  # no ONNX file could be timed
        limit = target.limit(dense)
        tolerance = LATENCY_TOLERANCE if target.name == "latency" else TARGET_TOLERANCE
        met = value <= (1 + tolerance) * limit
        return cls(str(target), limit, value, met, tolerance, predicted)

    @property
    def figures(self) -> str:
        """The value and the limit, for people."""
        if not self.target.startswith("latency"):
            return f"{self.value:,.0f} (limit {self.limit:,.0f})"
        text = f"{self.value:.3g} ms (limit {self.limit:.3g} ms)"
        return text if self.predicted is None else f"{text}, {self.predicted:.3g} ms predicted"


@dataclass(frozen=True)
class FrontierPoint:
    """A model of the frontier.

    Attributes:
        name: the speed-up that was asked for, such as ``2x``.
        latency_ms: of the file, as measured.
        speedup: over the dense model in FP32.
        accuracy: of the file on the evaluation samples, from 0 to 1; None if unknown.
        drop: percentage points lost, with the paired 90 % interval; None if unknown.
        onnx_bytes: size of the file.
        precision: the form that was kept.

    """

    name: str
    latency_ms: float
    speedup: float
    accuracy: float | None
    drop: str | None
    onnx_bytes: int
    precision: str


@dataclass(frozen=True, repr=False)
class RunReport:
    """All that one run of ``fxprune.compile`` found; ``content`` gives the stable keys."""

    before: Measures
    after: Measures
    targets: tuple[TargetEntry, ...]
    entries: tuple[Entry, ...]
    checks: Mapping[str, Check]
    groups: tuple[GroupEntry, ...]
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    speedup: tuple[float, float, float] | None = None
    seconds: float = 0.0
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    precision: Precision | None = None

    @property
    def target_met(self) -> bool | None:
        """Whether every target is met; None if there is none."""
        return all(target.met for target in self.targets) if self.targets else None

    @property
    def ok(self) -> bool:
        """Whether every target is met and every check that ran has passed."""
        failed = any(check.passed is False for check in self.checks.values())
        return self.target_met is not False and not failed

    @property
    def verdict(self) -> str:
        """Whether the run did what was asked, in a few words."""
        missed = [target.target for target in self.targets if not target.met]
        failed = [name for name, check in self.checks.items() if check.passed is False]
        reasons = [f"target {name} not met" for name in missed]
        reasons += [f"check {name} failed" for name in failed]
        return ", ".join(reasons) or "all targets met, all checks passed"

    @property
    def summary(self) -> str:
        """The change of parameters, MACs and accuracy, and the verdict, on one line."""
        before, after = self.before, self.after
        pairs = [("parameters", before.params, after.params), ("MACs", before.macs, after.macs)]
        known = [(name, a, b) for name, a, b in pairs if a is not None and b is not None]
        parts = [f"{name} {a:,} -> {b:,}" for name, a, b in known]
        if before.accuracy is not None and after.accuracy is not None:
            parts.append(f"accuracy {before.accuracy:.2%} -> {after.accuracy:.2%}")
        return ", ".join([*parts, self.verdict])

    def __repr__(self) -> str:
        return f"RunReport({self.summary})"

    @property
    def tables(self) -> tuple[ReportTable, ...]:
        """The tables of all passes."""
        return tuple(table for entry in self.entries for table in entry.outcome.tables)

    def content(self) -> dict[str, Any]:
        """Return what ``report.json`` holds."""
        return {
            "before": asdict(self.before),
            "after": asdict(self.after),
            "target": ",".join(entry.target for entry in self.targets) or None,
            "target_met": self.target_met,
            "targets": [asdict(entry) for entry in self.targets],
            "passes": [_pass_content(entry) for entry in self.entries],
            "checks": {name: asdict(check) for name, check in self.checks.items()},
            "groups": [asdict(group) for group in self.groups],
            "sensitivity": {name: list(curve) for name, curve in self.curves.items()},
            "speedup": None if self.speedup is None else list(self.speedup),
            "seconds": self.seconds,
            "precision": None if self.precision is None else asdict(self.precision),
            "trials": [asdict(trial) for trial in self.trials],
            "frontier": [asdict(point) for point in self.frontier],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def to_json(self) -> str:
        """Return ``report.json``; values that are not numbers become null."""
        return json.dumps(_finite(self.content()), indent=2, allow_nan=False) + "\n"


def _pass_content(entry: Entry) -> dict[str, Any]:
    return {
        "spec": entry.spec,
        "seconds": entry.seconds,
        "changes": entry.outcome.changes,
        "skipped": [asdict(skip) for skip in entry.outcome.skips],
        "params": entry.after.params,
        "macs": entry.after.macs,
        "notes": list(entry.outcome.notes),
        "tables": [asdict(table) for table in entry.outcome.tables],
        "predicted": dict(entry.outcome.predicted),
        "details": dict(entry.outcome.details),
    }


def _finite(value: Any) -> Any:
    """Make a value plain JSON: NaN and infinities become null, unknown types text."""
    match value:
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float():
            return value if abs(value) < float("inf") else None
        case None | bool() | int() | str():
            return value
    return _finite(value.item()) if hasattr(value, "item") else str(value)


def environment(device: str, seed: int, threads: int) -> dict[str, Any]:
    """Describe where the run took place."""
    packages = ("fxprune", "torch", "onnx", "onnxruntime", "numpy")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch_threads": torch.get_num_threads(),
        "latency_threads": threads,
        "seed": seed,
    }
