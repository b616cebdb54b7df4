"""A domain's pool: every sample it may draw from, encoded once to MDS sample bytes, in keyed-hash order.

The order is that of keyed hashes of sample ids, so it does not depend on how the files were cut or on how many workers
built it (pooling.py), and new data leaves the relative order of the rest alone.

    pool/<domain>/pool.json             what the pool says of itself
    pool/<domain>/part-00000.arrow      PART_SCHEMA, in pool order; memory-mapped by readers
    pool/<domain>/texts.parquet         the text of the first samples in pool order, for fitting classifiers
    pool/<domain>/eval/                 the held-out split, as MDS
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import mds
from vtmix.artifacts import PoolManifest
from vtmix.errors import DamageError

PART_SCHEMA = pa.schema(
    {"sample_id": pa.string(), "tokens": pa.int32(), "response_tokens": pa.int32(), "mds": pa.large_binary()}
)

Measure = Literal["tokens", "response_tokens", "sample_bytes"]
REMEMBERED = 4
"""Parts whose running sums are kept at hand."""


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


def numbers(chunks: Iterable[pa.Array]) -> npt.NDArray[np.int64]:
    """The values of an int32 column. Buffers are read as they lie: Arrow's own conversion would import pandas."""
    found = [np.frombuffer(chunk.buffers()[1], np.int32, len(chunk), 4 * chunk.offset) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *found])


def byte_lengths(chunks: Iterable[pa.Array]) -> npt.NDArray[np.int64]:
    """The lengths of the values of a large_binary column, in bytes."""
    edges = [np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, 8 * chunk.offset) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *map(np.diff, edges)])


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
        self._sums: OrderedDict[tuple[int, Measure], npt.NDArray[np.int64]] = OrderedDict()

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

        Raises DamageError when it is not the file that pool.json says.
        """
        meta = self.manifest.parts[number]
        path = self.folder / meta.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamageError(f"{path} is missing, though {self.folder.name}/pool.json lists it") from None
        if size != meta.bytes:
            raise DamageError(f"{path} has {size:,} bytes, pool.json says {meta.bytes:,}")
        try:
            return read_ipc(path)
        except pa.ArrowException as error:
            raise DamageError(f"{path}: not readable as Arrow ({error}): build the pool again") from None

    def window(self, position: int, count: int) -> list[pa.Table]:
        """The tables whose rows, one after the other, are the samples of a window."""
        return [self.part(s.part).slice(s.start, s.stop - s.start) for s in self.slices(position, count)]

    def measured(self, position: int, count: int, measure: Measure) -> int:
        """The tokens, response tokens or bytes of a window. It is read at its two ends only, however long it is."""
        return self._before(position + count, measure) - self._before(position, measure)

    def nearest(self, position: int, amount: float, measure: Measure) -> int:
        """How many samples from a position on come nearest to an amount of tokens, response tokens or bytes."""
        sought = self._before(position, measure) + amount
        totals = self._totals(measure)
        passes, rest = divmod(sought, float(totals[-1]))
        part = min(int(np.searchsorted(totals, rest, side="right")), len(totals) - 1)
        before = int(totals[part - 1]) if part else 0
        sums = self._running(part, measure)
        place = min(int(np.searchsorted(sums, rest - before, side="right")) - 1, len(sums) - 2)
        place += rest - before - sums[place] > sums[place + 1] - (rest - before)
        first = int(self._ends[part - 1]) if part else 0
        count: int = max(0, int(passes) * self.manifest.samples + first + place - position)
        return count

    def _before(self, position: int, measure: Measure) -> int:
        """What stands before a position of the endless repetition."""
        totals = self._totals(measure)
        passes, place = divmod(position, self.manifest.samples)
        part = int(np.searchsorted(self._ends, place, side="right"))
        first, before = (int(self._ends[part - 1]), int(totals[part - 1])) if part else (0, 0)
        return passes * int(totals[-1]) + before + int(self._running(part, measure)[place - first])

    def _totals(self, measure: Measure) -> npt.NDArray[np.int64]:
        """Running sums over the parts."""
        return np.cumsum([getattr(part, measure) for part in self.manifest.parts], dtype=np.int64)

    def _running(self, part: int, measure: Measure) -> npt.NDArray[np.int64]:
        """Running sums within a part, from 0 on: one more than it has samples."""
        found = self._sums.pop((part, measure), None)
        if found is None:
            table = self.part(part)
            chunks = table["mds" if measure == "sample_bytes" else measure].chunks
            values = byte_lengths(chunks) if measure == "sample_bytes" else numbers(chunks)
            found = np.concatenate([[0], np.cumsum(values)])
        self._sums[part, measure] = found
        if len(self._sums) > REMEMBERED:
            self._sums.popitem(last=False)
        return found

    def samples(self, position: int, count: int) -> Iterator[mds.Sample]:
        """The decoded samples of a window."""
        for table in self.window(position, count):
            for value in table["mds"]:
                yield mds.decode_sample(value.as_buffer().to_pybytes())

    def find(self, sample_id: str) -> int | None:
        """The place of a sample in pool order, None when the pool does not hold it."""
        for number in range(len(self.manifest.parts)):
            place: int = self.part(number)["sample_id"].index(sample_id).as_py()
            if place >= 0:
                return place + (int(self._ends[number - 1]) if number else 0)
        return None

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
