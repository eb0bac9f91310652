"""Errors on the command line: one paragraph and an exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fxprune.cli.quiet import quiet
from fxprune.errors import FxpruneError


@contextmanager
def exits(debug: bool) -> Iterator[None]:
    """Turn errors into one paragraph and an exit code; hide known warnings of libraries."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        with quiet(not debug):
            yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt as error:
        print("; ".join(["fxprune: interrupted", *_notes(error)]), file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        raise typer.Exit(_print(error)) from None


def _print(error: Exception) -> int:
    notes = "".join(f"\n  {note}" for note in _notes(error))
    if isinstance(error, FxpruneError):
        print(f"fxprune: {error}{notes}", file=sys.stderr)
        return error.exit_code
    first = next(iter(str(error).strip().splitlines()), "")
    print(
        f"fxprune: unexpected {type(error).__name__}: {first}{notes}\n"
        "this is a bug in fxprune: run again with --debug and report the traceback",
        file=sys.stderr,
    )
    return 1


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))
