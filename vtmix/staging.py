"""Where a mixture is prepared until it is published: a hidden folder beside its place, or the store it is to stand in.

A shard is written, then settled: from then on it lasts, and a compile that was interrupted takes it as it is. Many
workers write; the one who collects their reports settles.
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from vtmix import commit, mds
from vtmix.artifacts import MANIFEST
from vtmix.stores import Store


class Staging(Protocol):
    """A mixture on its way to its place; names are those of its files."""

    def record(self, name: str) -> bytes:
        """The record of a settled shard; empty when there is none."""
        ...

    def size(self, name: str) -> int | None:
        """The bytes of a file, None when there is none."""
        ...

    def write(self, name: str, size: int) -> AbstractContextManager[BinaryIO]:
        """A file to write `size` bytes to: it exists completely, or after an error not at all."""
        ...

    def settle(self, name: str, record: bytes) -> None:
        """Makes a shard last, and then its record."""
        ...

    def staged(self) -> bytes:
        """The manifest of a mixture that is complete, and only has to be published; empty when it is not."""
        ...

    def stage(self, index: bytes, manifest: bytes) -> None:
        """Completes the mixture; all its shards are settled."""
        ...

    def publish(self) -> None:
        """Makes the completed mixture visible."""
        ...


def _content(path: Path) -> bytes:
    """What a file holds; nothing where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


class FolderStaging:
    """A hidden folder on the same disk, which one rename makes the mixture."""

    def __init__(self, final: Path, fingerprint: str, *, flush: bool = False) -> None:
        """Call it under the lock that guards `final`. With `flush`, whoever writes a file flushes it as well."""
        self._final = final
        self._flush = flush
        self._folder = commit.staging_folder(final, fingerprint)

    def record(self, name: str) -> bytes:
        """Read from the file beside the shard."""
        return _content(self._record(name))

    def size(self, name: str) -> int | None:
        """The size of the file in the hidden folder."""
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, size: int) -> AbstractContextManager[BinaryIO]:
        """Written under another name, and renamed when complete."""
        return commit.staged(self._folder / name, size, flush=self._flush)

    def settle(self, name: str, record: bytes) -> None:
        """Flushes the shard, then writes its record."""
        if self._record(name).exists():
            return
        commit.flush_file(self._folder / name)
        # Not flushed: if the machine dies, a record that is not whole only has its shard written again.
        commit.write_staged(self._record(name), record, flush=False)

    def staged(self) -> bytes:
        """Read from the manifest in the hidden folder."""
        return _content(self._folder / MANIFEST)

    def stage(self, index: bytes, manifest: bytes) -> None:
        """Writes the index, then the manifest."""
        commit.write_staged(self._folder / mds.INDEX, index)
        commit.write_staged(self._folder / MANIFEST, manifest)

    def publish(self) -> None:
        """Removes the records, and renames the folder."""
        for record in self._folder.glob(self._record("*").name):
            record.unlink()
        commit.publish_folder(self._folder, self._final)

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}.done"


class StoreStaging:
    """A place in an object store, whose shards are no mixture before its manifest is there.

    The records of settled shards stand in a hidden folder on disk, named like that of a local mixture.
    """

    def __init__(self, store: Store, final: Path, fingerprint: str) -> None:
        """`final` is where a local mixture would stand. Call it under the lock that guards it."""
        self._store = store
        self._manifest = b""
        self._folder = commit.staging_folder(final, fingerprint)
        # With the index that a compile of other inputs left, a reader would take the new shards for the old ones.
        if store.size(mds.INDEX):
            store.put(mds.INDEX, b"")

    def record(self, name: str) -> bytes:
        """Read from the hidden folder."""
        return _content(self._folder / name)

    def size(self, name: str) -> int | None:
        """The size of the object."""
        return self._store.size(name)

    def write(self, name: str, size: int) -> AbstractContextManager[BinaryIO]:
        """Uploaded in parts as it is written; it appears when it is complete."""
        return self._store.write(name)

    def settle(self, name: str, record: bytes) -> None:
        """Writes the record: an object that is complete lasts."""
        commit.write_staged(self._folder / name, record, flush=False)

    def staged(self) -> bytes:
        """Nothing: a mixture whose manifest is there is published."""
        return b""

    def stage(self, index: bytes, manifest: bytes) -> None:
        """Uploads the index."""
        self._store.put(mds.INDEX, index)
        self._manifest = manifest

    def publish(self) -> None:
        """Uploads the manifest."""
        self._store.put(MANIFEST, self._manifest)
        shutil.rmtree(self._folder)
