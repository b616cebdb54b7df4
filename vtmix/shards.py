"""Writes MDS shards from pools by gathering sample bytes that are ready: the hot path.

Per shard and domain one contiguous window of the pool is memory-mapped; runs of samples are put in order by Arrow, with
the interpreter lock released, then hashed and written while they are in a core's cache. Where samples are packed, the
whole shard is put in order, and sequences.py makes its sequences. A shard depends on the plan and the pools alone, so
any worker can write it.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import mds
from vtmix.artifacts import Plan
from vtmix.errors import ConflictError, DamageError, MixtureError
from vtmix.plan import arrangement, shard_bounds
from vtmix.pool import Pool, byte_lengths, gather, numbers
from vtmix.sequences import packed, places
from vtmix.settings import Packing
from vtmix.staging import Staging

Data = bytes | memoryview

GATHER_BYTES = 1 << 21
"""Samples are gathered, hashed and written in runs of about this size, which stay in a core's cache throughout."""


@dataclass(frozen=True)
class ShardReport:
    """What a complete shard holds. `bytes` and `sha256` are those of its file, `raw_bytes` (None: not compressed) those
    of what was compressed.
    """

    number: int
    name: str
    samples: int
    bytes: int
    raw_bytes: int | None
    sha256: str
    tokens: dict[str, int]
    response_tokens: dict[str, int]
    sequences: int | None = None

    @property
    def size(self) -> mds.ShardSize:
        """What index.json says of it."""
        return size_of(self.sequences or self.samples, self.bytes, self.raw_bytes)


def size_of(samples: int, stored: int, raw: int | None) -> mds.ShardSize:
    """What index.json says of a shard, given the bytes it is stored as and those before compression (None: none).

    What it calls samples are sequences where they are packed.
    """
    return mds.ShardSize(samples, stored if raw is None else raw, None if raw is None else stored)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the stretch [start, stop) of the epoch."""

    number: int
    start: int
    stop: int


class _Window:
    """One domain's contiguous samples of a shard, in a few memory-mapped arrays, handed out in order."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        """Raises ArrowInvalid when a part is damaged: Arrow would follow a wrong offset out of the file."""
        self._arrays = [chunk for table in tables for chunk in table["mds"].chunks if len(chunk)]
        for array in self._arrays:
            array.validate(full=True)
        self.lengths = byte_lengths(self._arrays)
        self.tokens = _total(tables, "tokens")
        self.response_tokens = _total(tables, "response_tokens")
        self._tables = tables
        self._next = 0

    def sample_ids(self) -> list[str]:
        """The ids of all its samples, in order."""
        return [identity for table in self._tables for identity in table["sample_id"].to_pylist()]

    def take(self, count: int) -> Iterator[pa.Array]:
        """The next `count` samples, not copied."""
        while count:
            array = self._arrays[0]
            part = array.slice(self._next, count)
            yield part
            count -= len(part)
            self._next += len(part)
            if self._next == len(array):
                del self._arrays[0]
                self._next = 0


def _window(pool: Pool, position: int, count: int) -> _Window:
    """Raises DamageError when the pool's parts do not hold what pool.json says."""
    try:
        window = _Window(pool.window(position, count))
    except pa.ArrowException as error:
        raise DamageError(f"{pool.folder}: a part is damaged ({error}): build the pool again") from None
    if len(window.lengths) != count:
        raise DamageError(f"{pool.folder}: its parts hold fewer samples than pool.json says: build the pool again")
    return window


def _gathered(windows: Sequence[_Window], domains: npt.NDArray[np.int32]) -> memoryview:
    """The bytes of one run of samples: each domain's next ones, in the order given."""
    counts = np.bincount(domains, minlength=len(windows)).tolist()
    slices = [part for window, count in zip(windows, counts, strict=True) for part in window.take(count)]
    order = np.empty(len(domains), np.int64)
    order[np.argsort(domains, kind="stable")] = np.arange(len(domains))
    return gather(pa.concat_arrays(slices), order)


def _joined(content: Iterator[Data], size: int) -> memoryview:
    """The same bytes in one piece. Joined by Python, they would hold the interpreter lock, which NumPy releases."""
    whole = np.empty(size, np.uint8)
    place = 0
    for data in content:
        whole[place : place + len(data)] = np.frombuffer(data, np.uint8)
        place += len(data)
    return whole.data


def recorded(staging: Staging, name: str) -> ShardReport | None:
    """What the record of a settled shard says, None unless that shard stands beside it."""
    try:
        report = ShardReport(**json.loads(staging.record(name)))
        return report if staging.size(name) == report.bytes else None
    except (ValueError, TypeError):
        return None


def settle(staging: Staging, report: ShardReport) -> None:
    """Makes a written shard last, and its record after it."""
    staging.settle(report.name, json.dumps(asdict(report)).encode())


def _total(tables: Sequence[pa.Table], column: str) -> int:
    return int(numbers(chunk for table in tables for chunk in table[column].chunks).sum())


class ShardWriter:
    """Writes the shards of one epoch, each on its own and in any order."""

    def __init__(self, plan: Plan, pools: Mapping[str, Pool], layout: mds.Layout) -> None:
        """Raises ConflictError when a pool is not the one the plan was made from, MixtureError for a plan, written by
        hand, whose counts do not add up.
        """
        counted = sum(domain.count for domain in plan.domains.values())
        if counted != plan.samples or plan.shards > plan.samples:
            raise MixtureError(
                f"the plan of epoch {plan.epoch} counts {counted:,} samples in its domains, {plan.samples:,} in all, "
                f"in {plan.shards:,} shards: they have to agree, with at least one sample in every shard"
            )
        changed = [
            name
            for name, domain in plan.domains.items()
            if name not in pools or pools[name].manifest.fingerprint() != domain.pool
        ]
        if changed:
            raise ConflictError(
                f"the pools of {', '.join(changed)} are not those that epoch {plan.epoch} was planned on"
            )
        self.plan = plan
        self._pools = [pools[name] for name in plan.domains]
        self._positions = [domain.position for domain in plan.domains.values()]
        self.arrangement = arrangement(plan)
        self.layout = layout

    def tasks(self) -> list[ShardTask]:
        """One task per shard, in order."""
        return [ShardTask(number, start, stop) for number, (start, stop) in enumerate(shard_bounds(self.plan))]

    def write(self, task: ShardTask, staging: Staging) -> ShardReport:
        """Writes one shard, completely or not at all, but does not settle it; one that was settled before is left."""
        name = self.layout.name(task.number)
        if (done := recorded(staging, name)) is not None:
            return done
        windows = self._windows(task)
        lengths, runs = self._samples(task, windows)
        raw_bytes = self._raw_bytes(lengths)
        digest, size = hashlib.sha256(), 0
        with staging.write(name, raw_bytes) as file:
            for data in self._stored(lengths, runs):
                digest.update(data)
                size += file.write(data)
        return ShardReport(
            number=task.number,
            name=name,
            samples=task.stop - task.start,
            bytes=size,
            raw_bytes=raw_bytes if self.layout.compression else None,
            sha256=digest.hexdigest(),
            tokens={name: window.tokens for name, window in zip(self.plan.domains, windows, strict=True)},
            response_tokens={
                name: window.response_tokens for name, window in zip(self.plan.domains, windows, strict=True)
            },
            sequences=len(lengths) if self.layout.packing else None,
        )

    def content(self, task: ShardTask) -> Iterator[Data]:
        """The bytes of a shard before compression, in runs of about GATHER_BYTES, or of a sequence."""
        return self._content(*self._samples(task, self._windows(task)))

    def stored(self, task: ShardTask) -> Iterator[Data]:
        """The bytes of a shard's file."""
        return self._stored(*self._samples(task, self._windows(task)))

    def _content(self, lengths: mds.Integers, runs: Iterator[Data]) -> Iterator[Data]:
        return itertools.chain([self.layout.header(lengths)], runs)

    def _stored(self, lengths: mds.Integers, runs: Iterator[Data]) -> Iterator[Data]:
        content = self._content(lengths, runs)
        if self.layout.compression is None:
            return content
        return iter([self.layout.compress(_joined(content, self._raw_bytes(lengths)))])

    def _raw_bytes(self, lengths: mds.Integers) -> int:
        return self.layout.header_bytes(len(lengths)) + int(lengths.sum())

    def _samples(self, task: ShardTask, windows: Sequence[_Window]) -> tuple[mds.Integers, Iterator[Data]]:
        """What follows a shard's header: the lengths in bytes of its samples, or sequences, and their bytes in runs."""
        domains, _ = self.arrangement.stretch(task.start, task.stop)
        lengths = np.empty(len(domains), np.int64)
        for number, window in enumerate(windows):
            # Within a shard a domain's samples keep their order, so its lengths fall into place as they stand.
            lengths[domains == number] = window.lengths
        if self.layout.packing:
            sequences = self._sequences(task, domains, windows, lengths, self.layout.packing)
            return np.array(list(map(len, sequences)), np.int64), iter(sequences)
        step = max(1, GATHER_BYTES * len(lengths) // max(int(lengths.sum()), 1))
        return lengths, (_gathered(windows, domains[at : at + step]) for at in range(0, len(domains), step))

    def _sequences(
        self,
        task: ShardTask,
        domains: npt.NDArray[np.int32],
        windows: Sequence[_Window],
        lengths: mds.Integers,
        packing: Packing,
    ) -> list[bytes]:
        sample_ids = np.empty(len(domains), object)
        for number, window in enumerate(windows):
            sample_ids[domains == number] = window.sample_ids()
        edges = np.concatenate([[0], np.cumsum(lengths)])
        seed = self.plan.seed, task.number
        names = list(self.plan.domains)
        return list(packed(_gathered(windows, domains), edges, domains, names, list(sample_ids), packing, seed))

    def rows(self, task: ShardTask) -> mds.Integers:
        """The row of the shard in which each sample of its stretch stands: shape (samples,). Packed ones share rows."""
        if self.layout.packing is None:
            return np.arange(task.stop - task.start)
        domains, _ = self.arrangement.stretch(task.start, task.stop)
        tokens = np.empty(len(domains), np.int64)
        for number, (pool, position, count) in enumerate(self._reads(task)):
            tables = pool.window(position, count, ["tokens"])
            tokens[domains == number] = numbers(chunk for table in tables for chunk in table["tokens"].chunks)
        found, _ = places(tokens, domains, len(self._pools), self.layout.packing, (self.plan.seed, task.number))
        return found

    def _reads(self, task: ShardTask) -> Iterator[tuple[Pool, int, int]]:
        """Per domain: its pool, the position of the shard's first sample of it, and how many there are."""
        before, after = self.arrangement.before(task.start), self.arrangement.before(task.stop)
        for number, pool in enumerate(self._pools):
            first = int(before[number])
            yield pool, self._positions[number] + first, int(after[number]) - first

    def _windows(self, task: ShardTask) -> list[_Window]:
        # Opened per shard and dropped with it, so that memory mapped for one shard is given back before the next.
        return [_window(pool, position, count) for pool, position, count in self._reads(task)]
