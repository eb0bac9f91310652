from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (".py", ".j2", ".typed")


def on_disk() -> set[str]:
    """What should ship, under the names that it ships as."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fxprune").rglob("*")
        if path.suffix in SHIPPED and ROOT / "fxprune" / "passes" not in path.parents
    }
    found.discard("fxprune/py.typed")
    passes = {
        f"fxprune/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "passes").rglob("*")
        if path.suffix in SHIPPED
    }
    return found | passes | {"fxprune/py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("fxprune", "passes"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_what_is_on_disk_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == on_disk()


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert b"Apache License" in wheel.read(licence)
    (entries,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"fxprune = fxprune.cli.commands:main" in wheel.read(entries)


def test_passes_are_flat() -> None:
    folders = [path.name for path in (ROOT / "passes").iterdir() if path.is_dir()]
    assert set(folders) <= {"__pycache__"}


def test_passes_cannot_be_imported_under_the_wrong_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert "import fxprune.passes, not passes" in done.stderr


def test_the_command_is_installed() -> None:
    scripts = [point for point in entry_points(group="console_scripts") if point.name == "fxprune"]
    if not scripts:
        pytest.skip("fxprune is not installed, only importable")
    assert scripts[0].value == "fxprune.cli.commands:main"


def test_the_readmes_table_of_passes_is_rendered() -> None:
    done = subprocess.run(
        [sys.executable, "tools/render_passes.py", "--check"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
