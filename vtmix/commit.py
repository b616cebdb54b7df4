"""Publishes files: all or nothing, never twice, one process at a time.

A file becomes visible by one hard link, a folder by one rename, after its bytes were flushed to disk. Nothing that is
visible is ever overwritten. Locks are `flock`s, so they die with their process and leave nothing to clean up.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtmix.errors import ConflictError, LockedError, VtmixError

STAGING_PREFIX = ".staging-"


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock `name` of `folder`; raises LockedError naming the holder's pid when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(
                f"{folder}: process {holder} holds the {name} lock: wait for it to end, or end it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def publish_file(path: Path, data: bytes) -> bool:
    """Makes `data` visible at `path`; False when those bytes already stand there.

    Raises ConflictError when `path` exists with other bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _errors_named(path, len(data)):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.read_bytes() == data:
                    return False
                raise ConflictError(f"{path}: exists with other content, and committed files never change") from None
            flush_folder(path.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def staging_folder(final: Path, fingerprint: str) -> Path:
    """The folder in which `final` is prepared: named by what it is made from, so that only equal work resumes.

    Staging left by work on other inputs is removed. Call it under the lock that guards `final`.
    """
    staging = final.parent / f"{STAGING_PREFIX}{final.name}-{fingerprint[:16]}"
    for other in final.parent.glob(f"{STAGING_PREFIX}{final.name}-*"):
        if other != staging:
            shutil.rmtree(other)
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def write_staged(path: Path, data: bytes) -> None:
    """Writes a file of a staging folder so that it exists completely or not at all."""
    with _errors_named(path, len(data)):
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def publish_folder(staging: Path, final: Path) -> None:
    """Makes a staged folder, whose files are flushed, visible at `final` by one rename.

    Raises ConflictError when `final` exists.
    """
    if final.exists():
        raise ConflictError(f"{final}: exists, and committed folders never change")
    flush_folder(staging)
    staging.rename(final)
    flush_folder(final.parent)


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors_named(path: Path, needed: int) -> Iterator[None]:
    """Turns a full disk and the like into an error that names the file and the bytes it needed."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise VtmixError(f"{path}: cannot write {needed:,} bytes: {reason}: nothing was published") from error
