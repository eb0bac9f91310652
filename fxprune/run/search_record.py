"""The record of a search, search.json, from which other points are picked later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxprune.errors import InputError
from fxprune.planning.budget import Target
from fxprune.search.descent import Point
from fxprune.search.plan import NetworkPlan

FILE = "search.json"


def search_record(
    points: Sequence[Point], fp32_ms: float, drops: Mapping[int, float]
) -> dict[str, Any]:
    """Return what ``search.json`` holds: every point, and the drop of those that were tried."""
    return {
        "fp32_ms": fp32_ms,
        "points": [
            {
                "ms": point.cost,
                "damage": point.damage,
                "drop": drops.get(number),
                "plan": asdict(point.plan),
            }
            for number, point in enumerate(points)
        ],
    }


def pick(path: Path, *, max_drop: float | None = None, latency: str | None = None) -> NetworkPlan:
    """Return a plan of a search that was kept.

    Args:
        path: the ``search.json`` of a run.
        max_drop: percentage points; the fastest plan that lost no more in its trial.
        latency: ``2ms``, ``50%`` or ``2x``; the first plan that takes no more.

    Raises:
        InputError: the file cannot be read, or no plan fits.

    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points, whole = content["points"], float(content["fp32_ms"])
        plans = [_plan(point["plan"]) for point in points]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not the record of a search ({error}); compile without --target or with "
            "--frontier first"
        ) from error
    if (max_drop is None) == (latency is None):
        raise InputError("name one of --max-drop and --latency")
    if latency is not None:
        limit = Target.of("latency", latency).limit(whole)
        fitting = [n for n, point in enumerate(points) if point["ms"] <= limit]
        if not fitting:
            raise InputError(
                f"no plan takes at most {limit:.3g} ms; the fastest takes {points[-1]['ms']:.3g} ms"
            )
        return plans[fitting[0]]
    tried = [(n, one["drop"]) for n, one in enumerate(points) if one["drop"] is not None]
    return plans[max((n for n, drop in tried if drop <= max_drop), default=0)]


def _plan(content: Mapping[str, Any]) -> NetworkPlan:
    units = {name: tuple(map(int, numbers)) for name, numbers in content["units"].items()}
    return NetworkPlan(tuple(content["branches"]), units, content["attention"])
