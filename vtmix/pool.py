"""A domain's pool: every sample it may draw from, encoded once to MDS sample bytes, in keyed-hash order.

The order is that of keyed hashes of sample ids, so it does not depend on how the files were cut or on how many workers
built it (pooling.py), and new data leaves the relative order of the rest alone.

    pool/<domain>/pool.json             what the pool says of itself
    pool/<domain>/part-00000.arrow      PART_SCHEMA, in pool order; memory-mapped by readers
    pool/<domain>/texts.parquet         the text of the first samples in pool order, for fitting classifiers
    pool/<domain>/eval/                 the held-out split, as MDS
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import commit, mds
from vtmix.artifacts import PoolManifest, PoolPart
from vtmix.errors import ConflictError, DamageError
from vtmix.settings import MixtureConfig
from vtmix.stores import Store

PART_SCHEMA = pa.schema(
    {"sample_id": pa.string(), "tokens": pa.int32(), "response_tokens": pa.int32(), "mds": pa.large_binary()}
)

POOL = "pool.json"
EVAL_FILE = re.compile(r"eval/(index\.json|shard\.[0-9]{5,}\.mds)")
Measure = Literal["tokens", "response_tokens", "sample_bytes"]
BATCH_BYTES = 1 << 20
REMEMBERED = 4
"""Parts whose running sums are kept at hand."""


def read_ipc(path: Path) -> pa.Table:
    """A memory-mapped Arrow file: pages are read when they are touched."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_ipc(path: Path, table: pa.Table, rows: int | None = None) -> None:
    """Writes an Arrow file of a staging folder, completely or not at all, in batches of so many rows (None: one)."""
    with commit.staged(path, table.nbytes) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def batch_rows(samples: int, sample_bytes: int) -> int:
    """Rows of a part's record batches, which are what is read from a store: about BATCH_BYTES of samples."""
    return max(1, samples * BATCH_BYTES // max(sample_bytes, 1))


def numbers(chunks: Iterable[pa.Array]) -> npt.NDArray[np.int64]:
    """The values of an int32 column. Buffers are read as they lie: Arrow's own conversion would import pandas."""
    found = [np.frombuffer(chunk.buffers()[1], np.int32, len(chunk), 4 * chunk.offset) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *found])


def byte_lengths(chunks: Iterable[pa.Array]) -> npt.NDArray[np.int64]:
    """The lengths of the values of a large_binary column, in bytes."""
    edges = [np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, 8 * chunk.offset) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *map(np.diff, edges)])


def gather(array: pa.LargeBinaryArray, places: npt.NDArray[np.int64]) -> memoryview:
    """The bytes of an array's elements at these places, one after the other; the interpreter lock is released."""
    # Not pa.array(places), which would import pandas: that takes longer than writing several shards.
    indices = pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)])
    gathered = array.take(indices)
    _, offsets, data = gathered.buffers()
    first, *_, last = np.frombuffer(offsets, np.int64, len(gathered) + 1, 8 * gathered.offset)[[0, -1]].tolist()
    return memoryview(data)[first:last]


def _edges(sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where consecutive things of these sizes begin, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _interval(edges: npt.NDArray[np.int64], place: float) -> int:
    """The one of the intervals between edges that holds a place; of those it is beyond, the last."""
    return min(int(np.searchsorted(edges, place, side="right")) - 1, len(edges) - 2)


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one part of a pool."""

    part: int
    start: int
    stop: int


class Pool:
    """A committed pool, read by windows of the endless repetition of its order.

    Parts are read from its folder, or by range from its place in a store where the folder does not hold them.
    """

    def __init__(self, folder: Path, manifest: PoolManifest, store: Store | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._store = store
        self._edges = _edges([part.samples for part in manifest.parts])
        self._totals: dict[Measure, npt.NDArray[np.int64]] = {}
        self._sums: OrderedDict[tuple[int, Measure], npt.NDArray[np.int64]] = OrderedDict()

    def slices(self, position: int, count: int) -> Iterator[Slice]:
        """The rows that hold samples position … position + count - 1, the pool repeating without end."""
        size = self.manifest.samples
        while count > 0:
            place = position % size
            part = _interval(self._edges, place)
            start = place - int(self._edges[part])
            taken = min(count, int(self._edges[part + 1]) - place)
            yield Slice(part, start, start + taken)
            position, count = position + taken, count - taken

    def rows(self, rows: Slice, columns: Sequence[str] = PART_SCHEMA.names) -> pa.Table:
        """Rows of one part: columns of PART_SCHEMA; memory-mapped from a folder, or downloaded from a store.

        Raises DamageError when the part is not the file that pool.json says.
        """
        meta = self.manifest.parts[rows.part]
        path = self.folder / meta.name
        size = path.stat().st_size if path.exists() else None
        where = str(path)
        try:
            if size is None and self._store is not None:
                where = f"{self._store.url}/{meta.name}"
                return self._downloaded(meta, rows, columns)
            if size == meta.bytes:
                table = read_ipc(path).select(columns)
                return table.slice(rows.start, rows.stop - rows.start)
        except (pa.ArrowException, ValueError) as error:
            raise DamageError(f"{where}: not readable as Arrow ({error}): build the pool again") from None
        if size is None:
            raise DamageError(f"{path} is missing, though {self.folder.name}/pool.json lists it")
        raise DamageError(f"{path} has {size:,} bytes, pool.json says {meta.bytes:,}")

    def _downloaded(self, meta: PoolPart, rows: Slice, columns: Sequence[str]) -> pa.Table:
        """Rows of a part in a store: only the record batches that hold them, only the columns asked for."""
        store = cast(Store, self._store)
        options = pa.ipc.IpcReadOptions(included_fields=sorted(PART_SCHEMA.get_field_index(name) for name in columns))
        with store.open(meta.name) as file:
            if file.size() != meta.bytes:
                raise DamageError(f"{store.url}/{meta.name} has {file.size():,} bytes, pool.json says {meta.bytes:,}")
            reader = pa.ipc.open_file(file, options=options)
            per_batch = batch_rows(meta.samples, meta.sample_bytes)
            first, last = rows.start // per_batch, -(-rows.stop // per_batch)
            table = pa.Table.from_batches([reader.get_batch(number) for number in range(first, last)], reader.schema)
            return table.select(columns).slice(rows.start - first * per_batch, rows.stop - rows.start)

    def part(self, number: int, columns: Sequence[str] = PART_SCHEMA.names) -> pa.Table:
        """One whole part: columns of PART_SCHEMA."""
        return self.rows(Slice(number, 0, self.manifest.parts[number].samples), columns)

    def window(self, position: int, count: int, columns: Sequence[str] = PART_SCHEMA.names) -> list[pa.Table]:
        """The tables whose rows, one after the other, are the samples of a window."""
        return [self.rows(found, columns) for found in self.slices(position, count)]

    def measured(self, position: int, count: int, measure: Measure) -> int:
        """The tokens, response tokens or bytes of a window. It is read at its two ends only, however long it is."""
        return self._before(position + count, measure) - self._before(position, measure)

    def nearest(self, position: int, amount: float, measure: Measure) -> int:
        """How many samples from a position on come nearest to an amount of tokens, response tokens or bytes."""
        sought = self._before(position, measure) + amount
        totals = self._running_totals(measure)
        passes, rest = divmod(sought, float(totals[-1]))
        part = _interval(totals, rest)
        sums, within = self._running(part, measure), rest - int(totals[part])
        place = _interval(sums, within)
        place += within - sums[place] > sums[place + 1] - within
        count: int = max(0, int(passes) * self.manifest.samples + int(self._edges[part]) + place - position)
        return count

    def _before(self, position: int, measure: Measure) -> int:
        """What stands before a position of the endless repetition."""
        totals = self._running_totals(measure)
        passes, place = divmod(position, self.manifest.samples)
        part = _interval(self._edges, place)
        within = self._running(part, measure)[place - int(self._edges[part])]
        return passes * int(totals[-1]) + int(totals[part]) + int(within)

    def _running_totals(self, measure: Measure) -> npt.NDArray[np.int64]:
        """Running sums over the parts, from 0 on: one more than there are parts."""
        if measure not in self._totals:
            self._totals[measure] = _edges([getattr(part, measure) for part in self.manifest.parts])
        return self._totals[measure]

    def _running(self, part: int, measure: Measure) -> npt.NDArray[np.int64]:
        """Running sums within a part, from 0 on: one more than it has samples."""
        found = self._sums.pop((part, measure), None)
        if found is None:
            column = "mds" if measure == "sample_bytes" else measure
            chunks = self.part(part, [column])[column].chunks
            values = byte_lengths(chunks) if measure == "sample_bytes" else numbers(chunks)
            found = _edges(values)
        self._sums[part, measure] = found
        if len(self._sums) > REMEMBERED:
            self._sums.popitem(last=False)
        return found

    def samples(self, position: int, count: int) -> Iterator[mds.Sample]:
        """The decoded samples of a window."""
        for table in self.window(position, count, ["mds"]):
            for value in table["mds"]:
                yield mds.decode_sample(value.as_buffer().to_pybytes())

    def find(self, sample_id: str) -> int | None:
        """The place of a sample in pool order, None when the pool does not hold it."""
        for number in range(len(self.manifest.parts)):
            place: int = self.part(number, ["sample_id"])["sample_id"].index(sample_id).as_py()
            if place >= 0:
                return place + int(self._edges[number])
        return None

    def sample_ids(self) -> Iterator[str]:
        """Every sample id in pool order."""
        for number in range(len(self.manifest.parts)):
            yield from self.part(number, ["sample_id"])["sample_id"].to_pylist()


def open_pool(folder: Path, store: Store | None = None) -> Pool:
    """The pool in a folder, and in a store where one is named: then the folder mirrors all of it but the parts.

    Raises MissingError when there is none.
    """
    if store is not None:
        mirror(store, folder)
    remedy = "run `vtmix pool` first"
    return Pool(folder, PoolManifest.read(folder / POOL, remedy), store)


def eval_sizes(config: MixtureConfig, manifests: Mapping[str, PoolManifest]) -> dict[str, int]:
    """How many of its held-out samples every domain is evaluated on, after every epoch: the first ones, fixed.

    With training.eval_share, all domains together take at most that share of an epoch's training time, reckoned in
    tokens: a backward pass takes as long as two forward passes, and evaluation is a forward pass. The epoch is taken to
    consist of the domain whose samples are shortest. Every domain keeps at least one sample.
    """
    settings = config.training
    most = {name: manifest.eval.samples for name, manifest in manifests.items()}
    if settings.eval_share is None:
        return {name: min(settings.eval_samples or count, count) for name, count in most.items()}
    shortest = min((found.tokens / found.samples for found in manifests.values() if found.samples), default=0.0)
    budget = 3 * settings.eval_share * config.samples_per_epoch * shortest / len(manifests)
    return {
        name: min(count, max(1, int(budget * count / max(manifests[name].eval.tokens, 1))))
        for name, count in most.items()
    }


def pool_store(config: MixtureConfig, domain: str) -> Store | None:
    """Where a domain's pool stands in a store; None where there is none."""
    return Store(config.pool.store).below(domain) if config.pool.store else None


def mirror(store: Store, folder: Path) -> None:
    """Downloads what is small of a pool in a store, its manifest last; does nothing where it is there already."""
    content = None if (folder / POOL).exists() else store.read(POOL)
    if content is None:
        return
    PoolManifest.decode(content, f"{store.url}/{POOL}")
    for name in store.names():
        if name == "texts.parquet" or EVAL_FILE.fullmatch(name):
            commit.make_folder((folder / name).parent)
            store.download(name, folder / name)
    commit.publish_file(folder / POOL, content)


def push(folder: Path, store: Store) -> None:
    """Uploads a pool, its manifest last; does nothing where it is there already.

    Raises ConflictError when another pool stands there.
    """
    content, found = (folder / POOL).read_bytes(), store.read(POOL)
    if found == content:
        return
    if found is not None:
        raise ConflictError(
            f"{store.url} holds a pool that was made from other inputs than {folder}: name another pool.store, or "
            "remove one of them"
        )
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != POOL):
        store.upload(path, path.relative_to(folder).as_posix())
    store.put(POOL, content)


def texts(folder: Path) -> list[str]:
    """The kept texts of a pool, in pool order."""
    import pyarrow.parquet as pq

    column: list[str] = pq.read_table(folder / "texts.parquet", columns=["text"])["text"].to_pylist()
    return column
