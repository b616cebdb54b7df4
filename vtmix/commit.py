"""Publishes files: all or nothing, never twice, one process at a time.

A file becomes visible by one hard link, a folder by one rename, after its bytes were flushed to disk. Nothing that is
visible is ever overwritten. Locks are `flock`s, so they die with their process and leave nothing to clean up. Several
attempts at one staged file may be under way (a worker that was given up for dead may still write): each writes under a
name of its own, the last to finish names the file, and what none finished is swept when its folder is published.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vtmix.errors import ConflictError, LockedError, VtmixError

STAGING_PREFIX = ".staging-"
REMOVED_PREFIX = ".removed-"
TEMPORARY_SUFFIX = ".tmp"
LOCK_ATTEMPTS = 20
LOCK_PAUSE = 0.05
"""Seconds between attempts, made only while the lock file names no holder: one is just coming or going."""


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock `name` of `folder`; raises LockedError naming the holder's pid when another process has it."""
    make_folder(folder)
    path = folder / f".{name}.lock"
    with _errors_named(f"{path}: cannot be locked"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _errors_named(f"{path}: cannot be locked"):
            _acquire(descriptor, folder, name)
            os.ftruncate(descriptor, 0)  # a holder that was killed left its pid
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):  # what remains is only a name: the lock itself goes with the descriptor
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, name: str) -> None:
    holder = ""
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode()
            if holder:
                break
            time.sleep(LOCK_PAUSE)
        else:
            return
    raise LockedError(f"{folder}: process {holder or 'unknown'} holds the {name} lock: wait for it to end, or end it")


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, so that they last."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with _errors_named(f"{folder}: cannot be made"):
        folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def publish_file(path: Path, data: bytes) -> bool:
    """Makes `data` visible at `path`; False when those bytes already stand there.

    Raises ConflictError when `path` exists with other bytes.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    with _errors_named(f"{path}: cannot write {len(data):,} bytes"):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            if path.read_bytes() == data:
                return False
            raise ConflictError(f"{path}: exists with other content, and committed files never change") from None
        finally:
            temporary.unlink(missing_ok=True)
    flush_folder(path.parent)
    return True


def staging_folder(final: Path, fingerprint: str) -> Path:
    """The folder in which `final` is prepared: named by what it is made from, so that only equal work resumes.

    Staging left by work on other inputs is removed. Call it under the lock that guards `final`.
    """
    staging = final.parent / f"{_staging_prefix(final)}{fingerprint[:16]}"
    make_folder(final.parent)
    discard_staging(final, keep=staging)
    with _errors_named(f"{staging}: cannot be prepared"):
        staging.mkdir(exist_ok=True)
    return staging


def discard_staging(final: Path, *, keep: Path | None = None) -> None:
    """Removes the folders in which `final` was prepared. Call it under the lock that guards `final`."""
    for staging in final.parent.glob(f"{_staging_prefix(final)}*"):
        if staging != keep:
            with _errors_named(f"{staging}: cannot be removed"):
                shutil.rmtree(staging)


def _staging_prefix(final: Path) -> str:
    # A dot parts the two names, since no name of a folder here holds one: 'law' must not take 'law-eu' for its own.
    return f"{STAGING_PREFIX}{final.name}."


def write_staged(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Writes a file of a staging folder so that it exists completely or not at all.

    Without `flush` that holds when the process dies, but not when the machine does.
    """
    with staged(path, len(data), flush=flush) as file:
        file.write(data)


@contextmanager
def staged(path: Path, size: int, *, flush: bool = True) -> Iterator[BinaryIO]:
    """A file of a staging folder to write `size` bytes to: it exists completely, or after an error not at all."""
    temporary = _temporary(path)
    with _errors_named(f"{path}: cannot write {size:,} bytes"):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def link_staged(path: Path, other: Path) -> None:
    """Gives a staged file a second name, `other`, in a folder that is to be published."""
    with _errors_named(f"{other}: cannot be made"):
        os.link(path, other)


def publish_folder(staging: Path, final: Path) -> None:
    """Makes a staged folder, whose files are flushed, visible at `final` by one rename, without what is temporary.

    Raises ConflictError when `final` exists.
    """
    if final.exists():
        raise ConflictError(f"{final}: exists, and committed folders never change")
    for folder, _, names in os.walk(staging):
        for name in names:
            if name.endswith(TEMPORARY_SUFFIX):
                Path(folder, name).unlink(missing_ok=True)
        flush_folder(Path(folder))
    with _errors_named(f"{final}: cannot be published"):
        staging.rename(final)
    flush_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that it is never visible in part."""
    hidden = folder.with_name(REMOVED_PREFIX + folder.name)
    folder.rename(hidden)
    flush_folder(folder.parent)
    shutil.rmtree(hidden)


def sweep_removed(parent: Path) -> None:
    """Deletes what a killed process left half removed."""
    for hidden in parent.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(hidden)


def flush_file(path: Path) -> None:
    """Flushes a file's bytes to disk."""
    _flush(path, os.O_RDONLY)


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk."""
    _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    with _errors_named(f"{path}: cannot be flushed to disk"):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name, of this attempt alone, for what is to become `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


@contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """Turns a full disk and the like into an error that names the file and the bytes it needed."""
    try:
        yield
    except OSError as error:
        raise VtmixError(f"{what}: {error.strerror or error}") from error
