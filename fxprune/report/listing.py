"""Every pass with its options and facts, from its fields and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxprune.pipeline.contract import Pass, default_of
from fxprune.pipeline.values import choices_of, show, type_text

_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", re.MULTILINE)


def describe(step: type[Pass]) -> dict[str, Any]:
    """Return the name of a pass, purpose, options with defaults, and facts, as plain values."""
    doc = inspect.cleandoc(step.__doc__ or "")
    _, _, attributes = doc.partition("Attributes:\n")
    texts = {
        name: " ".join(text.replace("``", "").split())
        for name, text in _ATTRIBUTE.findall(attributes)
    }
    module = inspect.getmodule(step)
    hints = get_type_hints(step)
    purpose = inspect.cleandoc((module and module.__doc__) or doc).partition("\n\n")[0]
    return {
        "name": step.name,
        "does": " ".join(purpose.split()),
        "options": {
            option.name.replace("_", "-"): {
                "default": None if default_of(option) is MISSING else show(default_of(option)),
                "required": default_of(option) is MISSING,
                "type": type_text(hints[option.name]),
                "values": list(choices_of(hints[option.name])),
                "meaning": texts.get(option.name, ""),
            }
            for option in fields(step)
        },
        "needs": sorted(fact.name for fact in step.needs),
        "gives": sorted(fact.name for fact in step.gives),
        "keeps": sorted(fact.name for fact in step.keeps),
    }


def print_passes(steps: Iterable[type[Pass]], console: Console) -> None:
    """Print every pass with its options."""
    for step in steps:
        found = describe(step)
        facts = [f"{word} {', '.join(found[word])}" for word in ("needs", "gives") if found[word]]
        console.print(
            Text.assemble((found["name"], "bold"), f"  {'; '.join(facts)}" if facts else "")
        )
        console.print(f"  {found['does']}", highlight=False, markup=False)
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, option in found["options"].items():
            default = "required" if option["required"] else option["default"]
            meaning = f"{option['meaning'].removesuffix('.')} ({option['type']})"
            table.add_row("", Text(f"{name}={default}", style="cyan"), Text(meaning))
        if found["options"]:
            console.print(table)
        console.print()
