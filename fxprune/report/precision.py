"""Floats or 8-bit codes: which of the two a result was kept in, and what both measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figures:
    """What one form's ONNX file was measured to be."""

    latency_ms: float
    onnx_bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Precision:
    """Which form was kept, and what both were measured to be.

    Attributes:
        kept: its name.
        why: the reason, for people.
        fp32: the result in floats; None if it was not measured.
        int8: the result in codes; None if it was not measured.
        speedup: how many times as fast codes are as floats, side by side in one run.

    """

    kept: Literal["fp32", "int8"]
    why: str
    fp32: Figures | None = None
    int8: Figures | None = None
    speedup: float | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        text = f"precision: {self.kept.upper()}, {self.why}"
        if self.fp32 is None or self.int8 is None:
            return text
        pairs = [f"{self.int8.latency_ms:.3f} against {self.fp32.latency_ms:.3f} ms"]
        pairs.append(f"{self.int8.onnx_bytes:,} against {self.fp32.onnx_bytes:,} bytes")
        if self.int8.accuracy is not None and self.fp32.accuracy is not None:
            pairs.append(f"{100 * self.int8.accuracy:.2f} against {100 * self.fp32.accuracy:.2f} %")
        return f"{text} (INT8 against FP32: {', '.join(pairs)})"
