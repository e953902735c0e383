"""Places: where the files of a store lie, in a folder or at a URL on object storage.

A place is a `Path`, or a `RemotePath` with the words of `Path` that a store needs. What the two do
in different ways is a function of this file.

Object storage has no folders, no renaming and no locks. It has objects under names, and an object
is put whole: a reader sees all of the old content or all of the new one. That is what a store asks
of every write, so drafts, syncing and renaming fall away there. The file system of a URL comes from
fsspec, which finds keys, tokens and addresses where its own documentation says: in the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` …), in ``~/.aws``, or in ``~/.config/fsspec``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flowdata._common.atomic import replacing
from flowdata.errors import StoreError

# The file systems that put objects whole, and the extras that bring what fsspec needs for them.
# That of the Hub comes with `datasets`; the one in memory is fsspec's own.
_EXTRAS = {"s3": "s3", "gs": "gs", "hf": None, "memory": None}
_URL = re.compile(r"([A-Za-z][\w+.:-]+)://")
_HUB, _BUCKETS = "hf://", "hf://buckets/"


class RemotePath:
    """The name of an object, or the beginning of the names of several, on object storage.

    Args:
        url: such as ``"s3://bucket/scores"``.

    Raises:
        ImportError: the package for such URLs is missing.
    """

    parents: tuple[RemotePath, ...] = ()  # nothing above it could stand in its way

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        self.suffix = Path(self.name).suffix
        self._system, self._path = _file_system(self._url)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}/{name}")

    # --- looking -----------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether there is an object of this name, or one whose name goes on after it."""
        return self._look_up() is not None

    def is_dir(self) -> bool:
        """Return whether there are objects whose names go on after this one."""
        entry = self._look_up()
        return entry is not None and entry["type"] == "directory"

    def is_symlink(self) -> bool:
        """Return False: object storage has no links."""
        return False

    def entries(self) -> dict[str, bool]:
        """Return the names below this one, and whether each is an object's."""
        with self._explained("listed"):
            self._system.invalidate_cache()  # other processes write there, too
            with suppress(FileNotFoundError):
                entries = self._system.ls(self._path, detail=True)
                paths = {entry["name"].rstrip("/"): entry["type"] == "file" for entry in entries}
                paths.pop(self._path, None)  # an empty object may stand for the folder itself
                return {path.rpartition("/")[2]: is_file for path, is_file in paths.items()}
        return {}

    def modified(self) -> int:
        """Return when the object was written, by the storage's clock, in ns since 1970."""
        with self._explained("looked up"):
            self._system.invalidate_cache()
            return int(self._system.modified(self._path).timestamp() * 1e9)

    def _look_up(self) -> dict[str, Any] | None:
        # `exists` of some file systems takes every error for an absence, so that a store would be
        # begun again where the network fails.
        with self._explained("looked up"), suppress(FileNotFoundError):
            self._system.invalidate_cache()
            entry: dict[str, Any] = self._system.info(self._path)
            return entry
        return None

    # --- reading -----------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """Return the object's content."""
        with self._explained("read"):
            content: bytes = self._system.cat_file(self._path)
        return content

    def beginning(self, count: int) -> bytes:
        """Return the object's first bytes, at most `count`."""
        with self._explained("read"):
            self._system.invalidate_cache()
            end = min(count, self._system.info(self._path)["size"])  # no range beyond it is read
            content: bytes = self._system.cat_file(self._path, start=0, end=end) if end else b""
        return content

    def copy_to(self, file: Path) -> None:
        """Write the object's content into a file."""
        with self._explained("read"):
            self._system.get_file(self._path, str(file))

    # --- writing -----------------------------------------------------------------------------

    def write(self, content: bytes) -> None:
        """Put the object, whole."""
        with self._explained("written"):
            self._system.pipe_file(self._path, content)

    def create(self, content: bytes) -> bool:
        """Put the object unless there is one; return whether it was put.

        The storage itself refuses the second of two that come at once where it knows conditional
        writes, as S3 and GCS do. The Hub does not: there both may be told that theirs was put.
        """
        if self.exists():
            return False
        try:
            with self._explained("written"):
                self._system.pipe_file(self._path, content, mode="create")
        except OSError:
            # File systems tell in different ways that somebody was faster.
            if self.exists():
                return False
            raise
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with self._explained("removed"):
            try:
                self._system.rm_file(self._path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_all(self) -> None:
        """Remove every object whose name goes on after this one."""
        with self._explained("removed"), suppress(FileNotFoundError):
            self._system.invalidate_cache()
            self._system.rm(self._path, recursive=True)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: names may have slashes without a folder being there."""

    def rmdir(self) -> None:
        """Do nothing: without objects there is no folder."""

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Say of an error which URL could not be read or written, and what to do."""
        try:
            yield
        except FileNotFoundError as error:
            if action == "written":
                raise FileNotFoundError(
                    f"{self} could not be written, because its bucket is not there ({error}): "
                    "make the bucket first, or correct its name"
                ) from error
            raise FileNotFoundError(f"there is nothing at {self}") from error
        except Exception as error:
            told = f"{self} could not be {action} ({type(error).__name__}: {error})"
            # botocore and google-auth have errors of their own where keys are missing.
            lacks_keys = "Credential" in type(error).__name__
            if lacks_keys or _is_denied(error):
                reason = "no keys were found" if lacks_keys else "the keys do not allow it"
                raise PermissionError(f"{told}: {reason}. {_remedy(self._url)}") from error
            raise ConnectionError(
                f"{told}. Check the address and the network; what is kept there stays, and the "
                "same call goes on from it"
            ) from error


Place: TypeAlias = Path | RemotePath


def place_of(name: str | Place) -> Place:
    """Return the place that a path or a URL names.

    Args:
        name: a path, or a URL that begins with ``s3://``, ``gs://``, ``hf://``, ``memory://`` or
            ``file://``.

    Raises:
        ValueError: a URL of another kind, without a bucket, or in a `Path`, which drops a slash.
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
        return Path(url2pathname(urlsplit(text).path))
    if scheme not in _EXTRAS:
        raise ValueError(
            f"store must be a path, or a URL that begins with s3://, gs:// or hf://, got {text!r}: "
            f"{scheme}:// is not known to put files whole"
        )
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no bucket; pass a URL such as {scheme}://bucket/scores")
    return RemotePath(text)


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
        return first[:-1] if first.endswith(":") and first[:-1] in _EXTRAS else None
    match = _URL.match(name)
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


def write_whole(file: Place, content: bytes) -> None:
    """Write a file so that all of the new content is there, or all of the old."""
    if isinstance(file, RemotePath):
        file.write(content)
        return
    with replacing(file) as draft:
        draft.write(content)


def remove_folder(folder: Place) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(folder, RemotePath):
        folder.remove_all()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its own name for what the URL names."""
    from fsspec.core import url_to_fs  # comes with `datasets`

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ImportError(
            f'{scheme}:// needs a package: pip install "flowdata-torch[{_EXTRAS[scheme]}]" '
            f"({error})"
        ) from None
    return system, str(path).rstrip("/")


def _is_denied(error: Exception) -> bool:
    """Whether the storage refused, in Python's way or with HTTP's numbers."""
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", getattr(error, "code", None))
    return isinstance(error, PermissionError) or str(code) in ("401", "403")


def _remedy(url: str) -> str:
    """Where the keys for a URL are looked for."""
    return {
        "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in with the AWS tools, as "
        "somebody who may list, read, write and delete there",
        "gs": "Log in with `gcloud auth application-default login`, as somebody who may list, "
        "read, write and delete there",
        "hf": "Log in with `hf auth login`, with a token that may write there",
    }.get(url.partition(":")[0], "Check that this user may read and write there")
