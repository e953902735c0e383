"""A lock that one process holds on a folder, on one host or over a shared file system.

The lock is a file that only one process can create (O_EXCL, which NFS honours too; flock it may
not). It names its holder, who touches it every few seconds. A lock is stale, and is taken over,
when its holder is a process of this host that is gone, or when nobody has touched it for
`STALE` seconds of the waiting process's own clock: no two clocks are ever compared. A lock taken
over wrongly, from a process that was stopped for that long, costs double work and nothing else,
as long as files are replaced whole and hold the same content whoever writes them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from flowdata._common.notices import logger

BEAT, STALE = 5.0, 90.0  # seconds; a shared file system may show a touch a minute late
_POLL = 0.25

_Seen = tuple[bytes, int]  # a lock's content and when it was last touched


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for a block; wait, and say so, while another process has it.

    Args:
        path: the lock file; its folder exists.
        what: what the holder does, for the sentence that tells of waiting.

    Raises:
        OSError: the folder can't be written to.
    """
    pid = os.getpid()
    holder = {"host": _host(), "pid": pid, "born": _born(pid), "id": uuid.uuid4().hex}
    content = json.dumps(holder).encode()
    _wait_for(path, content, what)
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, released), daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join()
        seen = _look(path)
        if seen is not None and seen[0] == content:
            path.unlink(missing_ok=True)


def _wait_for(path: Path, content: bytes, what: str) -> None:
    told, since = False, monotonic()
    last: _Seen | None = None
    while not _create(path, content):
        seen = _look(path)
        if seen is None:
            continue  # just released
        if seen != last:
            last, since = seen, monotonic()
        if _is_gone(seen[0]) or monotonic() - since > STALE:
            logger.warning("taking over the lock %s from a process that is gone", path)
            _break(path, seen[0])
            continue
        if not told:
            logger.warning("another process is %s; waiting for it to end", what)
            told = True
        sleep(_POLL)


def _create(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _look(path: Path) -> _Seen | None:
    try:
        with path.open("rb") as file:  # opening makes NFS ask its server anew
            return file.read(4096), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _break(path: Path, stale: bytes) -> None:
    """Take a stale lock away; should it be a fresh one by now, put it back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if aside.read_bytes() != stale:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _beat(path: Path, released: threading.Event) -> None:
    while not released.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _is_gone(content: bytes) -> bool:
    """Whether the holder was a process of this host and is no more."""
    try:
        holder: Any = json.loads(content)
        host, pid, born = holder["host"], int(holder["pid"]), holder["born"]
    except (ValueError, TypeError, KeyError):  # not written yet, or damaged: time will tell
        return False
    if host != _host() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return bool(_born(pid) != born)


def _host() -> str:
    """This host and, where containers share its name, the space in which pids count."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _born(pid: int) -> str:
    """When a process started, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
