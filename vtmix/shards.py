"""Writes MDS shards from pools by gathering sample bytes that are ready: the hot path.

Per shard and domain one contiguous window of the pool is memory-mapped; runs of samples are put in order by Arrow, with
the interpreter lock released, then hashed and written while they are in a core's cache. A shard depends on the plan and
the pools alone, so any worker can write it.
"""

import hashlib
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
from vtmix.pool import Pool, byte_lengths, numbers
from vtmix.staging import Staging

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

    @property
    def size(self) -> mds.ShardSize:
        """What index.json says of it."""
        return size_of(self.samples, self.bytes, self.raw_bytes)


def size_of(samples: int, stored: int, raw: int | None) -> mds.ShardSize:
    """What index.json says of a shard, given the bytes it is stored as and those before compression (None: none)."""
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
        self._next = 0

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
    places = np.empty(len(domains), np.int64)
    places[np.argsort(domains, kind="stable")] = np.arange(len(domains))
    # Not pa.array(places), which would import pandas: that takes longer than writing several shards.
    indices = pa.Array.from_buffers(pa.int64(), len(places), [None, pa.py_buffer(places)])
    gathered = pa.concat_arrays(slices).take(indices)
    _, offsets, data = gathered.buffers()
    first, *_, last = np.frombuffer(offsets, np.int64, len(gathered) + 1, 8 * gathered.offset)[[0, -1]].tolist()
    return memoryview(data)[first:last]


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
        self._arrangement = arrangement(plan)
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
        samples = task.stop - task.start
        raw_bytes = self.layout.header_bytes(samples) + sum(int(window.lengths.sum()) for window in windows)
        digest, size = hashlib.sha256(), 0
        with staging.write(name, raw_bytes) as file:
            for data in self._stored(self._content(task, windows)):
                digest.update(data)
                size += file.write(data)
        return ShardReport(
            number=task.number,
            name=name,
            samples=samples,
            bytes=size,
            raw_bytes=raw_bytes if self.layout.compression else None,
            sha256=digest.hexdigest(),
            tokens={name: window.tokens for name, window in zip(self.plan.domains, windows, strict=True)},
            response_tokens={
                name: window.response_tokens for name, window in zip(self.plan.domains, windows, strict=True)
            },
        )

    def content(self, task: ShardTask) -> Iterator[bytes | memoryview]:
        """The bytes of a shard before compression, in runs of about GATHER_BYTES."""
        return self._content(task, self._windows(task))

    def stored(self, task: ShardTask) -> Iterator[bytes | memoryview]:
        """The bytes of a shard's file."""
        return self._stored(self.content(task))

    def _stored(self, content: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        return content if self.layout.compression is None else iter([self.layout.compress(b"".join(content))])

    def _content(self, task: ShardTask, windows: Sequence[_Window]) -> Iterator[bytes | memoryview]:
        domains, _ = self._arrangement.stretch(task.start, task.stop)
        lengths = np.empty(len(domains), np.int64)
        for number, window in enumerate(windows):
            # Within a shard a domain's samples keep their order, so its lengths fall into place as they stand.
            lengths[domains == number] = window.lengths
        yield self.layout.header(lengths)
        step = max(1, GATHER_BYTES * len(lengths) // max(int(lengths.sum()), 1))
        for start in range(0, len(domains), step):
            yield _gathered(windows, domains[start : start + step])

    def sample_ids(self, task: ShardTask) -> list[str]:
        """The ids of a shard's samples, in order."""
        domains, _ = self._arrangement.stretch(task.start, task.stop)
        identities = np.empty(len(domains), object)
        for number, (pool, first, count) in enumerate(self._reads(task)):
            found = [identity for table in pool.window(first, count) for identity in table["sample_id"].to_pylist()]
            identities[domains == number] = found
        return list(identities)

    def _reads(self, task: ShardTask) -> Iterator[tuple[Pool, int, int]]:
        """Per domain: its pool, the position of the shard's first sample of it, and how many there are."""
        before, after = self._arrangement.before(task.start), self._arrangement.before(task.stop)
        for number, pool in enumerate(self._pools):
            first = int(before[number])
            yield pool, self._positions[number] + first, int(after[number]) - first

    def _windows(self, task: ShardTask) -> list[_Window]:
        # Opened per shard and dropped with it, so that memory mapped for one shard is given back before the next.
        return [_window(pool, position, count) for pool, position, count in self._reads(task)]
