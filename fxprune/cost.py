"""What a program costs: parameters, multiply-accumulates per sample, weight bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Exact static costs of a program.

    Attributes:
        params: elements of all distinct parameters that the graph reads.
        macs: multiply-accumulates of one sample (convolutions, linear layers, matrix products,
            attention, recurrent cells).
        weight_bytes: bytes of those parameters and of the buffers that the graph reads.
    """

    params: int
    macs: int
    weight_bytes: int
