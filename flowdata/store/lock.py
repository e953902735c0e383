"""A lock that one process holds on a store: on one host, over a shared file system, or at a URL.

    1. Take     create the lock file with O_EXCL, which succeeds for one process alone; write the
                holder into it. NFS honours O_EXCL, flock it may not.
    2. Hold     a thread touches the file every `BEAT` seconds.
    3. Wait     whoever finds the file there looks again every `_POLL` seconds. The lock is stale
                - if its holder is a process of this host that is gone, or
                - if content and time of touch have not changed for `STALE` seconds of the waiting
                  process's own clock: the clocks of two hosts are never compared.
    4. Break    rename a stale lock to a name of one's own, which again succeeds for one process
                alone, and read it. If it is another lock by now, put it back. Go on with 1.
    5. Release  delete the file, unless it names another holder by now.

A process that was stopped for `STALE` seconds loses its lock although it goes on later. Two
processes then do the same work. That costs time and nothing else, because files are replaced whole
and hold the same content whoever writes them.

**On object storage** the lock is an object. Creating it is a conditional write, which succeeds for
one process alone (S3, GCS; the Hub has none, so two that begin at once may both take the lock).
Touching is writing the same content again, which renews the time that the storage notes. There is
no renaming, so breaking is a look and a removal: two processes that wait for the same stale lock
may both take it, if one looks just before the other removes. Both times the two do the same work.
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
from flowdata.store.places import Place
from flowdata.store.remote import RemotePath

# Seconds. A shared file system may show a touch to other hosts a minute late, so a lock counts as
# stale only some beats after that.
BEAT, STALE = 5.0, 90.0
_POLL = 0.25  # seconds; how long a released lock may lie unused
_MOST_BYTES = 4096  # of a lock that are read; ours has some 150

_Sighting = tuple[bytes, int]  # a lock's content, and when it was last touched, in ns


@contextmanager
def lock(path: Place, what: str) -> Iterator[None]:
    """Hold the lock file `path` for a block; wait, and say so, while another process has it.

    Args:
        path: the lock file; its folder exists.
        what: what the holder does, for the sentence that tells of waiting.

    Raises:
        OSError: the folder can't be written to.
    """
    pid = os.getpid()
    # The id tells this lock from another of the same process.
    holder = {"host": _host(), "pid": pid, "born": _start_time(pid), "id": uuid.uuid4().hex}
    content = json.dumps(holder).encode()
    _wait_for(path, content, what)
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, content, released), daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join()
        with suppress(ConnectionError):  # the storage is out of reach: the lock is stale soon
            if _holds(path, content):
                path.unlink(missing_ok=True)


def _wait_for(path: Place, content: bytes, what: str) -> None:
    """Create the lock file with this content, as soon as no other process has it."""
    has_spoken, unchanged_since = False, monotonic()
    last_sighting: _Sighting | None = None
    while not _create(path, content):
        sighting = _look(path)
        if sighting is None:
            continue  # just released
        if sighting != last_sighting:
            last_sighting, unchanged_since = sighting, monotonic()
        if _is_gone(sighting[0]) or monotonic() - unchanged_since > STALE:
            logger.warning("taking over the lock %s from a process that is gone", path)
            _break(path, sighting[0])
            continue
        if not has_spoken:
            logger.warning("another process is %s; waiting for it to end", what)
            has_spoken = True
        sleep(_POLL)


def _create(path: Place, content: bytes) -> bool:
    """Create the lock file; False if it is there already."""
    if isinstance(path, RemotePath):
        return path.create(content)
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _look(path: Place) -> _Sighting | None:
    try:
        if isinstance(path, RemotePath):
            return path.beginning(_MOST_BYTES), path.modified()
        with path.open("rb") as file:  # opening makes NFS ask its server anew
            return file.read(_MOST_BYTES), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _break(path: Place, stale: bytes) -> None:
    """Take a stale lock away; put it back if it is a fresh one by now.

    Deleting it would not do: between the look and the deletion another process may break the
    stale lock and take a fresh one, which would then be deleted.
    """
    if isinstance(path, RemotePath):
        if _holds(path, stale):
            path.unlink(missing_ok=True)
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if aside.read_bytes() != stale:
            with suppress(OSError):  # a third process has taken the lock meanwhile
                os.link(aside, path)
        aside.unlink()


def _holds(path: Place, content: bytes) -> bool:
    """Whether the lock is the one with this content."""
    sighting = _look(path)
    return sighting is not None and sighting[0] == content


def _beat(path: Place, content: bytes, released: threading.Event) -> None:
    while not released.wait(BEAT):
        with suppress(OSError):
            if not isinstance(path, RemotePath):
                os.utime(path)
            elif _holds(path, content):
                path.write(content)


def _is_gone(content: bytes) -> bool:
    """Whether the holder was a process of this host that has ended."""
    try:
        holder: Any = json.loads(content)
        host, pid, start_time = holder["host"], int(holder["pid"]), holder["born"]
    except (ValueError, TypeError, KeyError):  # not written yet, or damaged: time will tell
        return False
    if host != _host() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)  # signal 0 does nothing but check that the process is there
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return bool(_start_time(pid) != start_time)  # a later process may have been given its number


def _host() -> str:
    """This host and, as containers may share its name, the namespace in which pids count."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}"


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since the host did; empty where that isn't told."""
    try:
        # Field 22 of the file. The name, field 2, stands in parentheses and may contain spaces, so
        # fields are counted from the last parenthesis on.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
