"""Progress of long work: a bar with a rate and the time left on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step where these are slow."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@dataclass(frozen=True)
class Tracker:
    """Shows how far a loop has come.

    Attributes:
        shown: draw the bar; by default only where standard error is a terminal.
        notes: print what is assumed also where standard error is no terminal.

    """

    shown: bool | None = None
    notes: bool = False

    @property
    def visible(self) -> bool:
        """Whether anything is shown."""
        return sys.stderr.isatty() if self.shown is None else self.shown

    def say(self, text: str) -> None:
        """Show a line that tells what is going on."""
        if self.visible:
            Console(stderr=True).print(text, highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Print something that is assumed, on a line of its own."""
        if self.notes or self.visible:
            out = Console(stderr=True, soft_wrap=True)
            out.print(f"note: {text}", highlight=False, markup=False)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, moving the bar by one after each."""
        if not self.visible:
            yield from items
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
