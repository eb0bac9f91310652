from __future__ import annotations

import os
from pathlib import Path

import pytest

from fxprune.errors import InputError
from fxprune.run.output import STAGING, check_writable, staged


def test_files_appear_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out) as staging:
        (staging / "model.onnx").write_text("new")
        assert [path.name for path in out.iterdir()] == [STAGING]
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


def _fail(folder: Path, error: type[BaseException]) -> None:
    with staged(folder) as staging:
        (staging / "model.onnx").write_text("new")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_if_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    old = tmp_path / "model.onnx"
    old.write_text("old")
    with pytest.raises(error):
        _fail(tmp_path, error)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "old")]


def test_a_folder_made_for_a_failed_run_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "model.onnx").write_text("half")
    with staged(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_report_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    with staged(tmp_path) as staging:
        for name in ("report.json", "zebra", "model.onnx"):
            (staging / name).write_text("")
    assert moved == ["model.onnx", "zebra", "report.json"]


def test_a_file_in_the_way_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="cannot write into the output folder"):
        check_writable(tmp_path / "out" / "deeper")
    with pytest.raises(InputError, match="choose another with -o"), staged(tmp_path / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_input_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_writable(tmp_path)


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
