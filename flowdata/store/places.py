"""Places: where the files of a store lie, in a folder or at a URL on object storage.

A place is a `Path`, or a `RemotePath` with the words of `Path` that a store needs. What the two do
in different ways is a function of this file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias
from urllib.request import url2pathname

from flowdata._common.atomic import replacing
from flowdata.errors import StoreError
from flowdata.store.remote import EXTRAS, RemotePath

_URL = re.compile(r"([A-Za-z][\w+.:-]+)://")
_HUB, _BUCKETS = "hf://", "hf://buckets/"

Place: TypeAlias = Path | RemotePath


def place_of(name: str | Place) -> Place:
    """Return the place that a path or a URL names.

    Args:
        name: a path, or a URL that begins with ``s3://``, ``gs://``, ``hf://``, ``memory://`` or
            ``file://``.

    Raises:
        ValueError: a URL of another kind, without a bucket, of a file on another host or without
            an absolute path, or in a `Path`, which drops a slash.
        ImportError: the package for such URLs is missing.

    Example:
        >>> place_of("scores"), place_of("memory://scores") / "parts"
        (PosixPath('scores'), RemotePath('memory://scores/parts'))
    """
    if isinstance(name, RemotePath):
        return name
    scheme, text = _scheme_of(name), str(name)
    if scheme is None:
        return Path(name)
    if isinstance(name, Path):
        raise ValueError(f"{text} was a URL and lost a slash, as in every Path; pass URLs as text")
    if scheme == "file":
        return _path_of_file_url(text)
    if scheme not in EXTRAS:
        raise ValueError(
            f"store must be a path, or a URL that begins with s3://, gs:// or hf://, got {text!r}: "
            f"{scheme}:// is not known to put files whole"
        )
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no bucket; pass a URL such as {scheme}://bucket/scores")
    return RemotePath(text)


def _path_of_file_url(url: str) -> Path:
    """The path in a ``file://`` URL, in which ``#`` and ``?`` are letters of names."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"file:// needs an absolute path, file:///…, got {url!r}")
    return Path(url2pathname(slash + path))


def local_path(name: str | Path, what: str) -> Path:
    """Return the path of what is written to a disk alone.

    Args:
        name: the path.
        what: the argument that it came in, for a message.

    Raises:
        ValueError: it is a URL.
    """
    if _scheme_of(name) is not None:
        raise ValueError(f"{what} must be a path on a disk, got the URL {name}")
    return Path(name)


def _scheme_of(name: str | Path) -> str | None:
    """What stands before the colon of a URL; None of a path."""
    if isinstance(name, Path):
        first = name.parts[0] if name.parts else ""
        return first[:-1] if first.endswith(":") and first[:-1] in (*EXTRAS, "file") else None
    match = _URL.match(str(name))
    return None if match is None else match[1]


def check_takes_parts(folder: Place) -> None:
    """Refuse a place that can't take a file every few seconds.

    Raises:
        StoreError: it is a repository of the Hub, where each write is a commit.
    """
    url = str(folder)
    if isinstance(folder, RemotePath) and url.startswith(_HUB) and not url.startswith(_BUCKETS):
        raise StoreError(
            f"{folder} is a repository of the Hub: each part of a store would be a commit there, "
            "and the Hub limits these. Score into hf://buckets/OWNER/NAME/… or another place, and "
            "write the finished scores with Scores.save"
        )


def names_in(folder: Place) -> list[str]:
    """Return the names of the files and folders in a folder, in order; none if it isn't there."""
    if isinstance(folder, RemotePath):
        return sorted(folder.entries())
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def files_in(folder: Place) -> list[Place]:
    """Return the files in a folder, by name; none if it isn't there."""
    if isinstance(folder, RemotePath):
        return [folder / name for name, is_file in sorted(folder.entries().items()) if is_file]
    return [file for file in sorted(folder.glob("*")) if file.is_file()]


def beginning_of(file: Place, count: int) -> bytes:
    """Return a file's first bytes, at most `count`, and no more than it has."""
    if isinstance(file, RemotePath):
        return file.beginning(count)
    with file.open("rb") as content:
        return content.read(min(count, file.stat().st_size))


@contextmanager
def local_copy(file: Place) -> Iterator[Path]:
    """Give a file on a disk with this content: the file itself, or a copy for the block."""
    if isinstance(file, Path):
        yield file
        return
    with TemporaryDirectory(prefix="flowdata-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / file.name
        file.copy_to(copy)
        yield copy


def write_whole(file: Place, *pieces: bytes | memoryview) -> None:
    """Write a file so that all of the new content, in pieces, is there, or all of the old."""
    if isinstance(file, RemotePath):
        file.write(b"".join(pieces))
        return
    with replacing(file) as draft:
        draft.writelines(pieces)


def remove_folder(folder: Place) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(folder, RemotePath):
        folder.remove_all()
    else:
        shutil.rmtree(folder, ignore_errors=True)
