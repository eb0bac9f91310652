from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fxprune.latency.cache import Host, Timing, age, load, save

HOST = Host("a processor", ("avx2",), "1.0", 1)


def test_gives_back_what_was_kept_and_adds_to_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    first, second = {"a": Timing(1.5, 0.1, 10.0)}, {"b": Timing(2.0, 0.2, 20.0)}
    assert load(path) == ({}, None)
    assert save(path, HOST, first) is None
    assert save(path, HOST, second) is None
    assert load(path) == (first | second, None)
    assert [other.name for other in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"times": {}}', '{"format": 3, "times": {"a": [0, 0, 0]}}',
     '{"format": 3, "times": {"a": [1]}}', '{"format": 3, "times": {"a": ["x", 0, 0]}}',
     '{"format": 3, "times": []}'],
)  # fmt: skip
def test_says_that_a_file_is_damaged_and_does_without(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    times, note = load(path)
    assert times == {}
    assert note is not None
    assert str(path) in note
    assert "damaged" in note
    assert save(path, HOST, {"a": Timing(1.0, 0.0, 1.0)}) is None
    assert load(path)[1] is None


def test_measures_again_if_the_format_is_old(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 0, "times": {}}))
    times, note = load(path)
    assert times == {}
    assert note is not None
    assert "old format" in note


def test_goes_on_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    note = save(tmp_path / "file" / "table.json", HOST, {"a": Timing(1.0, 0.0, 1.0)})
    assert note is not None
    assert "cannot write" in note


def test_tells_hosts_apart() -> None:
    here = Host.here(1)
    assert here.cpu
    paths = {here.path, Host.here(2).path, HOST.path}
    assert len(paths) == 3
    assert here.path == Host.here(1).path


def test_is_as_old_as_its_oldest_time() -> None:
    now = time.time()
    times = {"a": Timing(1.0, 0.0, now - 2 * 86400), "b": Timing(1.0, 0.0, now)}
    assert age(times) == pytest.approx(2.0, abs=1e-3)
    assert age({}) == pytest.approx(0.0, abs=1e-3)
