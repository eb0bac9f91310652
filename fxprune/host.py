"""The machine that a run is on: its processor, and where results about it may be kept."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path


def processor() -> str:
    """Return the name of the processor, as the system tells it."""
    return _listed().get("model name") or platform.processor() or platform.machine()


def features() -> tuple[str, ...]:
    """Return the vector extensions that kernels choose between, sorted; none if unknown."""
    flags = set(_listed().get("flags", "").split()) | set(_listed().get("Features", "").split())
    wide = ("avx", "fma", "amx", "asimd", "sve", "i8mm", "bf16")
    return tuple(sorted(flag for flag in flags if flag.startswith(wide)))


def _listed() -> Mapping[str, str]:
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return {}
    lines = listing.read_text(errors="replace").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cache_folder() -> Path:
    """Return the folder where the system's conventions put what can be made again."""
    home = Path.home()
    match sys.platform:
        case "darwin":
            return home / "Library" / "Caches" / "fxprune"
        case "win32":
            return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "fxprune"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else home / ".cache") / "fxprune"


def peak_memory() -> int | None:
    """Return the most memory that this process has had, in bytes; None where it is not told."""
    try:
        import resource  # not on every system
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
