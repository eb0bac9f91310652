"""FP32 or INT8: which of the two was kept, and what both measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figures:
    """What was measured of one ONNX file."""

    latency_ms: float
    onnx_bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Precision:
    """Which precision was kept, and what both measured.

    Attributes:
        kept: its name.
        why: the reason, for people.
        fp32: the FP32 file; None if it was not measured.
        int8: the INT8 file; None if it was not measured.
        speedup: how many times as fast as FP32 INT8 is, timed side by side in one run.

    """

    kept: Literal["fp32", "int8"]
    why: str
    fp32: Figures | None = None
    int8: Figures | None = None
    speedup: float | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        text = f"kept {self.kept.upper()}: {self.why}"
        if self.fp32 is None or self.int8 is None:
            return text
        pairs = [f"{self.int8.latency_ms:.3f} / {self.fp32.latency_ms:.3f} ms"]
        pairs.append(f"{self.int8.onnx_bytes:,} / {self.fp32.onnx_bytes:,} bytes")
        if self.int8.accuracy is not None and self.fp32.accuracy is not None:
            pairs.append(f"{100 * self.int8.accuracy:.2f} / {100 * self.fp32.accuracy:.2f} %")
        return f"{text}; INT8 / FP32: {', '.join(pairs)}"
