"""Run all checks that a change must pass; the tests run last, so that their summary is at the end.

Usage: ``python tools/check.py [arguments of pytest]``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SOURCES = ("fxprune", "passes", "tests", "tools", "examples")
QUICK = {
    "style": (PYTHON, "-m", "ruff", "check", *SOURCES),
    "format": (PYTHON, "-m", "ruff", "format", "--check", *SOURCES),
    "types": (PYTHON, "-m", "mypy"),
    "sizes": (PYTHON, "tools/sizes.py"),
    "rendered docs": (PYTHON, "tools/render_passes.py", "--check"),
}


def run(name: str, command: tuple[str, ...], environment: dict[str, str] | None = None) -> bool:
    """Run a command in the checkout, under a heading; whether it succeeded."""
    print(f"== {name}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    """Run all steps, whatever fails on the way, and name those that did."""
    failed = [name for name, command in QUICK.items() if not run(name, command)]
    # One thread a worker: the tests' tensors are small, and workers would fight for cores.
    workers = str(min(len(os.sched_getaffinity(0)), 4)) if hasattr(os, "sched_getaffinity") else "2"
    command = (PYTHON, "-m", "pytest", "-q", "-n", workers, *arguments)
    if not run("tests", command, {**os.environ, "OMP_NUM_THREADS": "1"}):
        failed.append("tests")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
