"""A cache of layer times on disk, one file per kind of host, so that each is measured once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from fxprune.files import write_text
from fxprune.host import cache_folder, features, processor
from fxprune.onnx.benchmark import CPU

FORMAT = 3


@dataclass(frozen=True)
class Host:
    """The properties of a host that the times of layers depend on.

    Attributes:
        cpu: name of the processor.
        features: its vector extensions.
        runtime: version of ONNX Runtime.
        threads: threads of one operator.
        provider: the execution provider of ONNX Runtime.

    """

    cpu: str
    features: tuple[str, ...]
    runtime: str
    threads: int
    provider: str = CPU

    @classmethod
    def here(cls, threads: int, provider: str = CPU) -> Host:
        """Describe this host."""
        return cls(processor(), features(), onnxruntime.__version__, threads, provider)

    @property
    def path(self) -> Path:
        """The file for this host in the user's cache folder."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_folder() / "latency" / f"{digest}.json"


@dataclass(frozen=True)
class Timing:
    """One layer's time.

    Attributes:
        us: microseconds per run, the median of several sweeps.
        spread: difference between the slowest and the fastest sweep, relative to the fastest.
        when: time of the measurement, in seconds since the epoch.

    """

    us: float
    spread: float
    when: float


def load(path: Path) -> tuple[dict[str, Timing], str | None]:
    """Read the times in a file; return them with a note on what is wrong with the file, if any.

    A file that does not exist, or is damaged, has no times.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}, f"the latency table {path} has an old format; its times are measured again"
        found = {str(key): Timing(*map(float, row)) for key, row in content["times"].items()}
        if not all(0 < one.us < float("inf") for one in found.values()):
            raise ValueError("a time is not positive")
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"the latency table {path} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"the latency table {path} is damaged ({error}); its times are measured again"
    return found, None


def save(path: Path, host: Host, times: Mapping[str, Timing]) -> str | None:
    """Add times to a file atomically; return a note if this failed."""
    merged = load(path)[0] | dict(times)
    rows = {key: [one.us, one.spread, one.when] for key, one in sorted(merged.items())}
    text = json.dumps({"format": FORMAT, "host": asdict(host), "times": rows}, indent=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        return f"cannot write the latency table {path} ({error.strerror})"
    return None


def age(times: Mapping[str, Timing]) -> float:
    """Return how many days ago the oldest of the times was measured."""
    oldest = min((one.when for one in times.values()), default=time.time())
    return max(time.time() - oldest, 0.0) / 86400
