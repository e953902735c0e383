"""Object storage: objects under names, reached through fsspec, with the words of `Path`.

Object storage has no folders, no renaming and no locks. It has objects under names, and an object
is put whole: a reader sees all of the old content or all of the new one. That is what a store asks
of every write, so drafts, syncing and renaming fall away there.

fsspec finds keys, tokens and addresses where its own documentation says: in the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` …), in ``~/.aws``, or in ``~/.config/fsspec``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The file systems that put objects whole, and the extras that bring what fsspec needs for them.
# That of the Hub comes with `datasets`; the one in memory is fsspec's own.
EXTRAS = {"s3": "s3", "gs": "gs", "hf": None, "memory": None}


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


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its own name for what the URL names."""
    from fsspec.core import url_to_fs  # comes with `datasets`

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ImportError(
            f'{scheme}:// needs a package: pip install "flowdata-torch[{EXTRAS[scheme]}]" ({error})'
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
