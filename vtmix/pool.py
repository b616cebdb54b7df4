"""A domain's pool: every sample it may draw from, encoded once to MDS sample bytes, in keyed-hash order.

The order is that of keyed hashes of sample ids, so it does not depend on how the files were cut or on how many workers
built it (pooling.py), and new data leaves the relative order of the rest alone.

    pool/<domain>/pool.json             what the pool says of itself
    pool/<domain>/part-00000.arrow      PART_SCHEMA, in pool order; memory-mapped by readers
    pool/<domain>/texts.parquet         the text of the first samples in pool order, for fitting classifiers
    pool/<domain>/eval/                 the held-out split, as MDS
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import mds
from vtmix.artifacts import PoolManifest
from vtmix.errors import DamageError

PART_SCHEMA = pa.schema(
    {"sample_id": pa.string(), "tokens": pa.int32(), "response_tokens": pa.int32(), "mds": pa.large_binary()}
)


def read_ipc(path: Path) -> pa.Table:
    """A memory-mapped Arrow file: pages are read when they are touched."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def ipc_bytes(table: pa.Table) -> bytes:
    """The content of an Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def gather(array: pa.LargeBinaryArray, places: npt.NDArray[np.int64]) -> memoryview:
    """The bytes of an array's elements at these places, one after the other; the interpreter lock is released."""
    # Not pa.array(places), which would import pandas: that takes longer than writing several shards.
    indices = pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)])
    gathered = array.take(indices)
    _, offsets, data = gathered.buffers()
    first, *_, last = np.frombuffer(offsets, np.int64, len(gathered) + 1, 8 * gathered.offset)[[0, -1]].tolist()
    return memoryview(data)[first:last]


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one part of a pool."""

    part: int
    start: int
    stop: int


class Pool:
    """A committed pool, read by windows of the endless repetition of its order."""

    def __init__(self, folder: Path, manifest: PoolManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._ends = np.cumsum([part.samples for part in manifest.parts], dtype=np.int64)

    def slices(self, position: int, count: int) -> Iterator[Slice]:
        """The rows that hold samples position … position + count - 1, the pool repeating without end."""
        size = self.manifest.samples
        while count > 0:
            place = position % size
            part = int(np.searchsorted(self._ends, place, side="right"))
            first = int(self._ends[part - 1]) if part else 0
            taken = min(count, int(self._ends[part]) - place)
            yield Slice(part, place - first, place - first + taken)
            position, count = position + taken, count - taken

    def part(self, number: int) -> pa.Table:
        """One part, memory-mapped: PART_SCHEMA.

        Raises DamageError when its size is not what pool.json says.
        """
        meta = self.manifest.parts[number]
        path = self.folder / meta.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamageError(f"{path} is missing, though {self.folder.name}/pool.json lists it") from None
        if size != meta.bytes:
            raise DamageError(f"{path} has {size:,} bytes, pool.json says {meta.bytes:,}")
        return read_ipc(path)

    def window(self, position: int, count: int) -> list[pa.Table]:
        """The tables whose rows, one after the other, are the samples of a window."""
        return [self.part(s.part).slice(s.start, s.stop - s.start) for s in self.slices(position, count)]

    def samples(self, position: int, count: int) -> Iterator[mds.Sample]:
        """The decoded samples of a window."""
        for table in self.window(position, count):
            for value in table["mds"]:
                yield mds.decode_sample(value.as_buffer().to_pybytes())

    def sample_ids(self) -> Iterator[str]:
        """Every sample id in pool order."""
        for number in range(len(self.manifest.parts)):
            yield from self.part(number)["sample_id"].to_pylist()


def open_pool(folder: Path) -> Pool:
    """The pool in a folder.

    Raises MissingError when there is none.
    """
    remedy = "run `vtmix pool` first"
    return Pool(folder, PoolManifest.read(folder / "pool.json", remedy))


def texts(folder: Path) -> list[str]:
    """The kept texts of a pool, in pool order."""
    import pyarrow.parquet as pq

    column: list[str] = pq.read_table(folder / "texts.parquet", columns=["text"])["text"].to_pylist()
    return column
