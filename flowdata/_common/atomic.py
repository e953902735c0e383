"""Files that are there whole or not at all: written beside their place, then renamed into it.

    draft written → synced to the disk → renamed to its name → folder synced

A rename within a folder happens at once, so that a reader finds the old content or the new one. The
draft is synced before, or after a power cut the name might stand for a file without content; the
folder is synced after, or the rename itself might be lost.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a draft beside `path` for writing; it takes the name once all of it is on the disk.

    After an error, in the block or here, the draft is gone and `path` holds what it held before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file by itself
        raise
    if os.name == "posix":  # Windows can't open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
