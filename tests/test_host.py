from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxprune.host import cache_folder, features, processor


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
