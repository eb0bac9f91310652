"""The report of a run as one HTML file: tables and drawings, nothing fetched from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.report.content import GroupEntry, RunReport
from fxprune.report.table import rows, trial_figures

WIDTH, HEIGHT = 150.0, 60.0  # of one sensitivity curve, in SVG units
MAX_BAR_WIDTH = 400.0  # of the longest bar


@dataclass(frozen=True)
class Curve:
    """One group's scores in rising order, as points of an SVG polyline, and where the cut fell."""

    name: str
    points: str
    cut: float | None
    low: str
    high: str


def to_html(report: RunReport) -> str:
    """Draw the report."""
    loader = PackageLoader("fxprune", "")
    drawing = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    groups = {group.name: group for group in report.groups}
    longest = max((entry.seconds for entry in report.entries), default=1.0)
    return drawing.get_template("report.html.j2").render(
        report=report,
        rows=list(rows(report)),
        bars=[_bar(group) for group in report.groups if group.frozen_because is None],
        frozen=[group for group in report.groups if group.frozen_because is not None],
        curves=[_curve(scores, groups[name]) for name, scores in report.curves.items()
                if name in groups and len(scores) > 1],
        times=[(entry, MAX_BAR_WIDTH * entry.seconds / longest) for entry in report.entries],
        skips=[(entry.spec.partition("{")[0], skip)
               for entry in report.entries for skip in entry.outcome.skips],
        trials=[(trial, trial_figures(trial)) for trial in report.trials],
        width=WIDTH, height=HEIGHT, bar=MAX_BAR_WIDTH,
    )  # fmt: skip


def _bar(group: GroupEntry) -> dict[str, Any]:
    kept = group.units - group.removed - group.implanted
    scale = MAX_BAR_WIDTH / max(group.units, 1)
    return {
        "group": group,
        "kept": kept,
        "widths": (scale * kept, scale * group.implanted, scale * group.removed),
    }


def _curve(scores: Sequence[float], group: GroupEntry) -> Curve:
    """Place scores on a logarithmic scale over the eight decades below the largest one."""
    top = max(max(scores), 1e-300)
    decades = [max(math.log10(max(score, 1e-300) / top), -8.0) for score in scores]
    floor = min(min(decades), -1e-9)
    steps = range(len(scores))
    points = " ".join(
        f"{WIDTH * step / (len(scores) - 1):.1f},{HEIGHT * decades[step] / floor:.1f}"
        for step in steps
    )
    cut = WIDTH * group.removed / group.units if group.removed else None
    return Curve(group.name, points, cut, f"{min(scores):.1e}", f"{max(scores):.1e}")
