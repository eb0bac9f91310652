from __future__ import annotations

import pytest

from fxprune.pipeline.progress import Tracker


def test_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker()
    tracker.say("hello")
    assert list(tracker.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_shows_itself_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(shown=True)
    tracker.say("[hello]")
    assert list(tracker.track(iter(range(3)), "counting", total=3)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "[hello]" in err
