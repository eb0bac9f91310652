"""``python -m fxprune`` is the command line."""

from __future__ import annotations

from fxprune.cli.commands import main

main()
