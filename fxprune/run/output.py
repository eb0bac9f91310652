"""The output folder: its files are written in a staging folder and appear together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import InputError
from fxprune.files import sync

STAGING = ".fxprune-partial"


def prepare(folder: Path) -> Path:
    """Make sure that files can be put into a folder, making it if need be; returns its path.

    Raises:
        InputError: the folder cannot be made or written to; nothing has been left behind.

    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f"{STAGING}-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        drop_empty(made)
        raise InputError(
            f"cannot write into the output folder {folder}: {error.strerror or error}; "
            "choose another with -o, or change its permissions"
        ) from error
    return folder


def check_writable(folder: Path) -> None:
    """Fail if files cannot be put into a folder; leaves everything as it was.

    Raises:
        InputError: the folder cannot be made or written to.

    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    prepare(folder)
    drop_empty(made)


def drop_empty(folders: list[Path]) -> None:
    """Remove those folders, innermost first, that exist and have nothing in them."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder inside ``folder``; its files move up if the block ends well.

    If the block raises, by Ctrl-C too, nothing in ``folder`` has changed, and the folder itself
    goes again if it was made for this. Each file is replaced in one step, in alphabetical order
    but for ``report.json``, which comes last and so says that the others are complete.

    Raises:
        InputError: the folder cannot be written to.

    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    staging = prepare(folder) / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir()
    try:
        yield staging
        files = sorted(staging.iterdir(), key=lambda path: (path.name == "report.json", path.name))
        for path in filter(Path.is_file, staging.rglob("*")):
            sync(path)
        for path in files:
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        drop_empty(made)
