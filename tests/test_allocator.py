from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from fxprune.cli.allocator import keep_freed_memory

REUSED = """
import ctypes, resource
from fxprune.cli.allocator import keep_freed_memory
assert {tuned} is False or keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = library.malloc(2**26)
    ctypes.memset(place, 1, 2**26)
    library.free(place)
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
    assert faults(tuned=True) * 100 < faults(tuned=False)


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() is False
