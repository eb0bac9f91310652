from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from fxprune.allocator import keep_freed_memory

REUSED = """
import resource, torch
from fxprune.allocator import keep_freed_memory
assert {tuned} is False or keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, tuned: bool) -> int:
    script = REUSED.format(tuned=tuned)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these parameters")
def test_freed_memory_is_used_again() -> None:
    assert faults(tuned=True) * 4 < faults(tuned=False)


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() is False
