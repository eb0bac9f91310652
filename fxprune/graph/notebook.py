"""Tables for notebooks: what ``_repr_html_`` of programs, groups and results returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MAX_ROWS = 40


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "group"), plural(2, "group"), plural(1200, "branch")
    ('1 group', '2 groups', '1,200 branches')
    """
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML; of more than 40 rows the first 40 and the number of the others."""
    rows = list(rows)
    lines = [f"<p><b>{escape(title)}</b></p>", "<table>", _row("th", columns)]
    lines += [_row("td", row) for row in rows[:MAX_ROWS]]
    lines.append("</table>")
    if len(rows) > MAX_ROWS:
        lines.append(f"<p>and {len(rows) - MAX_ROWS:,} more</p>")
    return "\n".join(lines)


def _row(tag: str, cells: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
