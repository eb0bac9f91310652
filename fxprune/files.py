"""Files that appear whole or not at all: written in a folder beside their place, then moved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write to; it replaces ``path`` if the block ends well.

    The yielded path lies in a folder of its own. Other files that the block writes there, such as
    the weights of a large ONNX model, are moved along first. If the block raises, ``path`` and the
    files beside it are as they were.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir()
    try:
        yield staging / path.name
        files = sorted(staging.iterdir(), key=lambda file: (file.name == path.name, file.name))
        for file in files:
            sync(file)
        for file in files:
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(staging)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make sure that a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
