"""Write the table of passes into the README, from their docstrings.

Usage: ``python tools/render_passes.py [--check]``; with ``--check`` nothing is written, and the
exit code is 1 if the README is out of date.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path

from fxprune import passes
from fxprune.pipeline.contract import Pass

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- passes: begin -->", "<!-- passes: end -->"


def table() -> str:
    """Return the passes of ``fxprune.passes`` as a Markdown table."""
    rows = ["| pass | | what it does | options |", "|---|---|---|---|"]
    return "\n".join(rows + [row(step) for step in passes.ALL])


def row(step: type[Pass]) -> str:
    """Return a pass's line: its name, whether it acts, its first sentence, its options."""
    documentation = inspect.getdoc(sys.modules[step.__module__]) or ""
    sentence = " ".join(documentation.split("\n\n")[0].split()).rstrip(".")
    options = ", ".join(f"`{field.name.replace('_', '-')}`" for field in fields(step)) or "-"
    acts = "acts" if step.acts else "decides"
    return f"| `{step.name}` | {acts} | {sentence} | {options} |"


def render(text: str) -> str:
    """Return the README with the table in its place."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write, or check."""
    text = README.read_text()
    rendered = render(text)
    if "--check" not in arguments:
        README.write_text(rendered)
    elif rendered != text:
        print("the README's table of passes is stale; run tools/render_passes.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
