"""The coverage table as text and as Markdown."""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]


def summary(records: Sequence[Record]) -> str:
    """Return one line per suite, then the failures."""
    lines = [f"{'suite':12s} passed  median trace s  groups/trace  median share"]
    for suite in dict.fromkeys(record["suite"] for record in records):
        mine = [record for record in records if record["suite"] == suite]
        done = [record for record in mine if "groups_s" in record]
        passed = sum(not record["failed"] for record in mine)
        lines.append(
            f"{suite:12s} {passed:3d}/{len(mine):<3d} {_median(done, 'trace_s'):10.1f} "
            f"{statistics.median([r['groups_s'] / r['trace_s'] for r in done] or [0]):12.2f} "
            f"{_median(done, 'share'):14.2f}"
        )
    failures = [record for record in records if record["failed"]]
    lines += [f"FAILED {r['suite']}:{r['model']} at {r['failed']}: {r['why']}" for r in failures]
    return "\n".join(lines)


def _median(records: Sequence[Record], key: str) -> float:
    return float(statistics.median([record[key] for record in records] or [0.0]))


def markdown(
    records: Sequence[Record], command: str, listed: Mapping[str, int] | None = None
) -> str:
    """Return the page: a summary, the failures by cause, what is frozen, one row per model."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    passed = sum(not record["failed"] for record in records)
    parts = [
        "# Tested models",
        "",
        f"Written on {today} by `{command}`; {passed} of {len(records)} models pass.",
        "",
        _INTRODUCTION,
        "",
        "| suite | listed | tried | passed | trace, s | groups / trace | share | memory |",
        "|" + "---|" * 8,
    ]
    for suite in dict.fromkeys(record["suite"] for record in records):
        mine = [record for record in records if record["suite"] == suite]
        done = [record for record in mine if "groups_s" in record]
        ratio = statistics.median([r["groups_s"] / r["trace_s"] for r in done] or [0])
        parts.append(
            f"| {suite} | {(listed or {}).get(suite, len(mine))} | {len(mine)} | "
            f"{sum(not r['failed'] for r in mine)} | "
            f"{_median(done, 'trace_s'):.1f} | {ratio:.2f} | {_median(done, 'share'):.2f} | "
            f"{_memory(mine)} |"
        )
    if failures := [record for record in records if record["failed"]]:
        parts += ["", "## What fails", ""]
        parts += [f"- **{_name(r)}** at {r['failed']}: {_clip(r['why'], 400)}" for r in failures]
    low = [record for record in records if record.get("share", 1) < 0.9]
    if low:
        parts += ["", "## Models where less than 90 % of the parameters can shrink", ""]
        parts += [_held(record) for record in low]
    return "\n".join([*parts, "", "## Every model", "", *_rows(records), ""])


def _memory(records: Sequence[Record]) -> str:
    """The ratios of the memory that groups take to a forward's: the median, and the largest."""
    both = [(r.get("groups_peak_mib"), r.get("forward_peak_mib")) for r in records]
    ratios = [groups / forward for groups, forward in both if groups is not None and forward]
    return f"{statistics.median(ratios):.2f}, {max(ratios):.2f}" if ratios else ""


_INTRODUCTION = """\
Each model, with random weights, is traced in its own process. Half of the units of every removable
group, chosen at random, are removed. The smaller model then runs forward at two batch sizes and
backward, and its ONNX file is compared with it in ONNX Runtime. *Share* is the fraction of the
parameters that belong to some removable unit. *Error* is the error of zero-then-remove, for the
groups that no normalisation mixes with others (limit: 1e-5 in single precision or, where rounding
alone exceeds that, 1e-10 in double precision). Times are seconds of processor time on one thread;
the first table has medians. *Memory* is the peak growth of the process while groups are found, in
MiB, compared with the growth in a forward pass at batch size 1; the program and its weights are
loaded before both. The first table has the median and the largest ratio. Models that are listed
but not tried, and empty cells, were not measured in this run."""


def _name(record: Record) -> str:
    return f"{record['suite']}:{record['model']}"


def _clip(text: str, length: int) -> str:
    text = " ".join(str(text).split()).replace("|", "\\|")
    text = re.sub(r'"/[^"]*?(site-packages/|(?=[^/"]*"))', '"', text)  # where it is installed
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _held(record: Record) -> str:
    reasons = "; ".join(
        f"{entry['group']} ({entry['share']:.0%}): {_clip(entry['because'], 240)}"
        for entry in record["frozen"][:2]
        if entry["share"] > 0.005
    )
    tensors = ", ".join(record["tensors_held"][:3])
    return f"- **{_name(record)}** {record['share']:.0%}: {reasons or f'untouched: {tensors}'}"


def _rows(records: Sequence[Record]) -> list[str]:
    rows = [
        "| model | params, M | trace, s | groups, s | removable groups | share | remaining | "
        "error | ONNX parity | memory | result |",
        "|" + "---|" * 11,
    ]
    for record in sorted(records, key=_name):
        cells = [
            _name(record), _number(record, "params", "{:.1f}", 1e-6),
            _number(record, "trace_s", "{:.1f}"), _number(record, "groups_s", "{:.2f}"),
            f"{record.get('free_groups', '')} of {record.get('groups', '')}",
            _number(record, "share", "{:.2f}"), _number(record, "params_left", "{:.2f}"),
            _number(record, "error", "{:.0e}"), _number(record, "parity", "{:.0e}"),
            _number(record, "groups_peak_mib", "{:.0f} of ")
            + _number(record, "forward_peak_mib", "{:.0f}"),
            _result(record),
            _compiled(record),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _result(record: Record) -> str:
    if record["failed"]:
        return f"fails at {record['failed']}"
    return "" if record.get("step") is None and "compile" in record else "passes"


def _compiled(record: Record) -> str:
    """The precision that the whole command chose, its time, or why it failed."""
    if "compile" not in record:
        return ""
    if record["compile"] is None:
        return f"fails: {_clip(record['compile_why'], 120)}"
    return f"{record['compile'].upper()}, {record['compile_s']:.0f} s"


def _number(record: Record, key: str, form: str, scale: float = 1.0) -> str:
    value = record.get(key)
    return form.format(value * scale) if value is not None else ""
