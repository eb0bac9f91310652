"""Plant one fault at a time in a copy of the checkout, and check that a test detects it.

Usage: ``python -m tools.mutants [words of a mutant's name]``. Prints a line for each; the exit code
is the number of faults that no test detected. A mutant replaces one piece of source by another; if
the piece does not occur exactly once, the mutant is reported as out of date.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.planted_faults import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


def survives(mutant: Mutant, checkout: Path) -> bool:
    """Plant a fault in a checkout, run its tests, and mend it again.

    Raises:
        LookupError: the piece of source is not there, or there more than once.

    """
    path = checkout / mutant.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(mutant.old) != 1:
        raise LookupError(
            f"{mutant.file} holds the piece {sound.count(mutant.old)} times, not once"
        )
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--hypothesis-profile=hasty"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, *mutant.tests.split()], cwd=checkout, env=environment, check=False,
            capture_output=True,
        )  # fmt: skip
    finally:
        path.write_text(sound, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed: the tests did not run
        raise LookupError(done.stdout.decode()[-2000:])
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the mutants whose names hold all of these words; returns how many survive."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in tracked:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
        for mutant in chosen:
            start = time.monotonic()
            survived = survives(mutant, Path(folder))
            survivors += survived
            word = "SURVIVED" if survived else "killed"
            print(f"{word:8} {time.monotonic() - start:5.0f} s  {mutant.name}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
