"""The table file of another machine: what ``python kit.zip times`` measured there.

A kit has times on a grid of widths. The time of a width between two of the grid is interpolated
between the largest smaller operator and the smallest larger one, in proportion to their sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import InputError
from fxprune.latency.cache import FORMAT, Host, Timing
from fxprune.onnx.profile import Profiled


@dataclass(frozen=True)
class Network:
    """What the dense network took on a machine, in FP32 for one sample.

    Attributes:
        dense_ms: its latency, in milliseconds.
        operators: the microseconds of all its nodes by operator, as profiled.

    """

    dense_ms: float
    operators: Mapping[str, float]

    @property
    def nodes(self) -> dict[str, Profiled]:
        """The profile, with all nodes of one operator as one."""
        return {name: Profiled(name, (us,)) for name, us in self.operators.items()}


def read_machine(path: Path) -> tuple[Host, dict[str, Timing], Network]:
    """Read the table file of another machine.

    Raises:
        InputError: there is no such file, or it is not what a kit writes.

    """
    again = "make it again with fxprune latency kit, and python kit.zip times on the machine"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InputError(f"the latency table {path} is of another version of fxprune; {again}")
        host = Host(**{**content["host"], "features": tuple(content["host"]["features"])})
        times = {str(key): Timing(*map(float, row)) for key, row in content["times"].items()}
        network = Network(float(content["dense_ms"]), dict(content["operators"]))
    except OSError as error:
        raise InputError(f"cannot read the latency table {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the latency table {path} is not one that a kit has written ({error!r}); {again}"
        ) from error
    if not all(0 < one.us < math.inf for one in times.values()):
        raise InputError(f"the latency table {path} has a time that is not positive; {again}")
    return host, times, network


class Neighbours:
    """Times of operators that a table lacks, from those of the same kind and geometry that it has.

    Args:
        times: of the table.

    """

    def __init__(self, times: Mapping[str, Timing]) -> None:
        families: dict[tuple[str, int], list[tuple[list[int], Timing]]] = {}
        for key, timing in times.items():
            family, dims = _parsed(key)
            families.setdefault((family, len(dims)), []).append((dims, timing))
        self._families: dict[tuple[str, int], tuple[Any, list[Timing]]] = {
            family: (np.array([dims for dims, _ in rows]), [timing for _, timing in rows])
            for family, rows in families.items()
        }

    def timing(self, key: str) -> Timing | None:
        """Return the time of an operator; None if nothing as large has been measured.

        An operator smaller than all that were measured takes the time of the smallest larger one.
        """
        family, wanted = _parsed(key)
        dims, timings = self._families.get((family, len(wanted)), (np.empty((0, len(wanted))), []))
        sizes, size = dims.prod(axis=1), math.prod(wanted)
        above = np.flatnonzero((dims >= wanted).all(axis=1))
        below = np.flatnonzero((dims <= wanted).all(axis=1))
        if not len(above):
            return None
        high = int(above[sizes[above].argmin()])
        if not len(below):
            return timings[high]
        low = int(below[sizes[below].argmax()])
        share = (size - sizes[low]) / max(sizes[high] - sizes[low], 1)
        us = timings[low].us + share * (timings[high].us - timings[low].us)
        spread = max(timings[low].spread, timings[high].spread)
        return Timing(us, spread, min(timings[low].when, timings[high].when))


def _parsed(key: str) -> tuple[str, list[int]]:
    family, _, dims = key.rpartition(" ")
    return family, json.loads(dims)
