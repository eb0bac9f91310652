from __future__ import annotations

from pathlib import Path

import pytest

from fxprune.files import replacing, write_text


def listed(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_text(path, "one")
    write_text(path, "two")
    assert listed(tmp_path) == {"state.json": "two"}


def _fail(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as staging:
        staging.write_text("half")
        staging.with_name(f"{staging.name}.data").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model[1].onnx"
    path.write_text("old")
    with pytest.raises(error):
        _fail(path, error)
    assert listed(tmp_path) == {"model[1].onnx": "old"}


def test_files_beside_it_move_along(tmp_path: Path) -> None:
    path = tmp_path / "model[1].onnx"
    with replacing(path) as staging:
        staging.write_text("graph")
        staging.with_name(f"{staging.name}.data").write_text("weights")
        assert not path.exists()
    assert listed(tmp_path) == {"model[1].onnx": "graph", "model[1].onnx.data": "weights"}


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.txt", "")
