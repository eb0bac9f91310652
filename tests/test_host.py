from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxprune.host import cache_folder, features, peak_memory, processor


def test_names_the_processor() -> None:
    assert processor()
    assert features() == tuple(sorted(set(features())))


@pytest.mark.parametrize(
    ("system", "given", "folder"),
    [
        ("linux", "/elsewhere", Path("/elsewhere/fxprune")),
        ("linux", "relative", Path("~/.cache/fxprune")),
        ("linux", "", Path("~/.cache/fxprune")),
        ("darwin", "/elsewhere", Path("~/Library/Caches/fxprune")),
    ],
)
def test_keeps_to_the_conventions_of_the_system(
    monkeypatch: pytest.MonkeyPatch, system: str, given: str, folder: Path
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == folder.expanduser()


def test_the_peak_of_memory_is_told_where_the_system_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = peak_memory()
    assert peak is None or 2**20 < peak < 2**42
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() is None
