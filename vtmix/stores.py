"""Object stores, as the few operations that pools and mixtures need: s3://, gs://, hf:// and whatever pyarrow or fsspec
reach. Credentials and endpoints come from the environment or the store's own configuration, and are written nowhere.

An object appears whole, when its upload ends. What makes several objects one thing is a last one, its manifest.
"""

import functools
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vtmix import commit
from vtmix.artifacts import MANIFEST, Manifest
from vtmix.errors import DamageError, VtmixError

CHUNK = 8 << 20


@dataclass(frozen=True)
class Store:
    """A place in an object store, by its URL: so small that it travels to any worker."""

    url: str

    def below(self, name: str) -> "Store":
        """A place within this one."""
        return Store(f"{self.url.rstrip('/')}/{name}")

    def size(self, name: str) -> int | None:
        """The bytes of an object, None when there is none."""
        files, path = self._place(name)
        with self._named(name, "looked up"):
            info = files.get_file_info(path)
        size: int | None = info.size
        return size if info.is_file else None

    def read(self, name: str) -> bytes | None:
        """An object's content, None when there is none."""
        files, path = self._place(name)
        try:
            with self._named(name, "read"), files.open_input_file(path) as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """An object as a pyarrow file that is read by ranges. Raises DamageError when there is none."""
        files, path = self._place(name)
        try:
            with self._named(name, "read"), files.open_input_file(path) as file:
                yield file
        except FileNotFoundError:
            raise DamageError(f"{self.url}/{name} is missing") from None

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """An object to write, which appears when it is complete; what an error leaves is never counted as one."""
        files, path = self._place(name)
        with self._named(name, "written"):
            if files.type_name == "local":  # a folder that is shared; stores proper have none to make
                files.create_dir(path.rpartition("/")[0], recursive=True)
            with files.open_output_stream(path) as file:
                yield file

    def put(self, name: str, data: bytes) -> None:
        """Writes an object."""
        with self.write(name) as file:
            file.write(data)

    def upload(self, path: Path, name: str) -> None:
        """Writes a file's content as an object, unless one of its size is there."""
        if self.size(name) == path.stat().st_size:
            return
        with path.open("rb") as source, self.write(name) as target:
            shutil.copyfileobj(source, target, CHUNK)

    def download(self, name: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
        """Writes an object's content to a file, completely or not at all.

        Raises DamageError when it is missing, or has not the bytes that are expected (None: whatever they are).
        """
        with self.open(name) as source:
            found = source.size()
            if size is not None and found != size:
                raise DamageError(f"{self.url}/{name}: has {found:,} bytes, expected {size:,}")
            digest = hashlib.sha256()
            with commit.staged(path, found) as target:
                while data := source.read(CHUNK):
                    digest.update(data)
                    target.write(data)
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise DamageError(f"{self.url}/{name}: its bytes have changed (digest {digest.hexdigest()[:12]}…)")

    def digest(self, name: str) -> tuple[int, str] | None:
        """An object's bytes and their SHA-256, None when there is none."""
        if self.size(name) is None:
            return None
        digest, size = hashlib.sha256(), 0
        with self.open(name) as source:
            while data := source.read(CHUNK):
                digest.update(data)
                size += len(data)
        return size, digest.hexdigest()

    def names(self) -> list[str]:
        """The names of all objects here, those further below among them."""
        from pyarrow import fs

        files, path = _opened(self.url)
        with self._named("", "listed"):
            found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(path).lstrip("/") for info in found if info.is_file)

    def _place(self, name: str) -> tuple[Any, str]:
        files, path = _opened(self.url)
        return files, f"{path.rstrip('/')}/{name}"

    @contextmanager
    def _named(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = " ".join(str(error).split())
            raise VtmixError(
                f"{self.url}/{name}: cannot be {what}: {reason}: check the URL, and that the environment holds the "
                "store's credentials and endpoint"
            ) from error


@functools.lru_cache(maxsize=64)
def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path within it."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(url)
    except (pa.ArrowException, ValueError):
        return _by_fsspec(url)
    return found


def _by_fsspec(url: str) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        import fsspec  # type: ignore[import-untyped]

        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise VtmixError(f"{url}: no such kind of store is known here: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(files)), path


def fetch(store: Store, manifest: Manifest, folder: Path) -> Path:
    """A mixture of a store as a folder, every file held against the manifest as it comes; one fetched before is kept.

    Raises DamageError naming the object that is missing or has changed.
    """
    if (folder / MANIFEST).exists():
        return folder
    commit.make_folder(folder)
    for file in manifest.files:
        path = folder / file.name
        if not path.exists():
            store.download(file.name, path, file.bytes, file.sha256)
    commit.write_staged(folder / MANIFEST, manifest.text())
    return folder
