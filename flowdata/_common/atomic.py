"""Files that have all of their new content or all of the old, even after a crash.

    write a draft → sync it to the disk → rename it to the file's name → sync the folder

A rename within a folder happens at once, so that a reader sees the old content or the new one. If
the draft were not synced before, a power cut might leave the name on a file without content. If the
folder were not synced after, a power cut might undo the rename.
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
    """Open a draft beside `path` for writing, and rename it to `path` after the block.

    After an error, in the block or here, the draft is removed and `path` has its old content.
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
