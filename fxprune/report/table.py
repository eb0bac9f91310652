"""The report of a run as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxprune.onnx.benchmark import Latency
from fxprune.pipeline.contract import ReportTable
from fxprune.planning.search import Trial
from fxprune.report.content import RunReport

MAX_TERMINAL_ROWS = 6  # rows of a pass's table on a terminal
Row = tuple[str, str, str, str]


def rows(report: RunReport) -> Iterator[Row]:
    """Yield the rows of the before/after table: name, before, after, change."""
    before, after = report.before, report.after
    yield _row("parameters", before.params, after.params, "{:,}")
    yield _row("MACs per sample", before.macs, after.macs, "{:,}")
    yield _row("weights, bytes", before.weight_bytes, after.weight_bytes, "{:,}")
    yield _row("ONNX file, bytes", before.onnx_bytes, after.onnx_bytes, "{:,}")
    name, *figures, change = _row("latency, ms", before.latency_ms, after.latency_ms, "{:.3f}")
    if report.speedup is not None:
        change = "{1:.2f}x as fast ({0:.2f} to {2:.2f})".format(*report.speedup)
    yield name, figures[0], figures[1], change
    yield _accuracy(before.accuracy, after.accuracy)


def _row(name: str, before: float | None, after: float | None, form: str) -> Row:
    shown = ["-" if value is None else form.format(value) for value in (before, after)]
    change = "" if not before or after is None else f"{100 * after / before:.1f} % of before"
    return name, shown[0], shown[1], change


def _accuracy(before: float | None, after: float | None) -> Row:
    shown = ["-" if value is None else f"{100 * value:.2f} %" for value in (before, after)]
    change = "" if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return "accuracy", shown[0], shown[1], change


def print_report(report: RunReport, console: Console) -> None:
    """Print the tables that a run ends with."""
    trials = [_trials(report)] if report.trials else []
    trials += [_frontier(report)] if report.frontier else []
    tables = [_short(table) for table in report.tables]
    console.print(Group(_figures(report), *trials, _passes(report), *tables, *_verdicts(report)))


def _figures(report: RunReport) -> Table:
    table = Table("", "before", "after", "change", box=None, pad_edge=False, header_style="bold")
    for number in (1, 2):
        table.columns[number].justify = "right"
    for row in rows(report):
        table.add_row(*row)
    return table


def _passes(report: RunReport) -> Table:
    table = Table(
        "pass", "seconds", "changes", "params after", "MACs after", box=None, pad_edge=False
    )
    for number in range(1, 5):
        table.columns[number].justify = "right"
    for entry in report.entries:
        cost, changes = entry.after, entry.outcome.changes
        figures = (f"{entry.seconds:.1f}", f"{changes:,}", f"{cost.params:,}", f"{cost.macs:,}")
        table.add_row(Text(entry.spec.replace(",", ", ")), *figures)
    return table


def _short(content: ReportTable) -> RenderableType:
    """The first rows of a pass's table, under its title."""
    rows = content.rows
    more = (
        f" ({MAX_TERMINAL_ROWS} of {len(rows)}, all in report.html)"
        if len(rows) > MAX_TERMINAL_ROWS
        else ""
    )
    first, *rest = content.columns
    table = Table(first, box=None, pad_edge=False)
    for name in rest:
        table.add_column(name, justify="right")
    for row in rows[:MAX_TERMINAL_ROWS]:
        table.add_row(*map(Text, row))
    return Group(Text(f"{content.title}{more}"), table)


def _frontier(report: RunReport) -> Table:
    table = Table("frontier", "ms", "speed-up", "accuracy", "kept as", "loss", box=None)
    for point in report.frontier:
        accuracy = "-" if point.accuracy is None else f"{100 * point.accuracy:.2f} %"
        table.add_row(
            point.name, f"{point.latency_ms:.3f}", f"{point.speedup:.2f}x", accuracy,
            point.precision.upper(), point.drop or "-",
        )  # fmt: skip
    return table


def _trials(report: RunReport) -> Table:
    table = Table("target", "seconds", "MACs", "accuracy", "loss", box=None, pad_edge=False)
    for number in range(1, 5):
        table.columns[number].justify = "right"
    for trial in report.trials:
        table.add_row(trial.target, f"{trial.seconds:.1f}", *trial_figures(trial))
    return table


def trial_figures(trial: Trial) -> tuple[str, str, str]:
    """Return MACs, accuracy and points lost as text."""
    if trial.macs is None or trial.accuracy is None or trial.drop is None:
        return "-", "-", "cannot be met"
    return f"{trial.macs:,}", f"{100 * trial.accuracy:.2f} %", f"{trial.drop:+.2f} points"


def _verdicts(report: RunReport) -> Iterator[RenderableType]:
    yield Text("")
    for target in report.targets:
        yield _verdict(target.met, f"target {target.target}: {target.figures}", "met", "NOT MET")
    for name, check in report.checks.items():
        if not check.ran:
            yield Text(f"{name}: not run ({check.note})", style="yellow")
            continue
        note = f" ({check.note})" if check.note else ""
        figures = f"{name}: {check.value:.2g}, limit {check.limit:.2g}{note}"
        yield _verdict(check.passed is not False, figures, "passed", "FAILED")
    if report.precision is not None:
        yield Text(report.precision.summary)
    for note in report.notes:
        yield Text(f"note: {note}")


def _verdict(good: bool, text: str, yes: str, no: str) -> Text:
    return Text.assemble(text, ", ", (yes, "green") if good else (no, "bold red"))


def print_latencies(found: Mapping[str, Latency], console: Console) -> None:
    """Print models timed against each other; speed-ups compare with the first."""
    table = Table("model", "median ms", "p10", "p90", "speed-up", "p10 to p90", box=None)
    for name, one in found.items():
        times = (f"{value:.3f}" for value in (one.median_ms, one.p10_ms, one.p90_ms))
        spread = f"{one.speedup_p10:.2f} to {one.speedup_p90:.2f}"
        table.add_row(Text(name), *times, f"{one.speedup:.2f}x", spread)
    console.print(table)
