"""Writes MDS shards from pools by gathering sample bytes that are ready: the hot path.

Per shard and domain one contiguous window of the pool is memory-mapped; runs of samples are put in order, hashed and
written while they are in a core's cache. A shard depends on the plan and the pools alone, so any worker can write it.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import commit, mds
from vtmix.artifacts import Plan
from vtmix.errors import ConflictError, DamageError, MixtureError
from vtmix.plan import arrangement, shard_bounds
from vtmix.pool import Pool

GATHER_BYTES = 1 << 19
"""Samples are gathered, hashed and written in runs of about this size, which stay in a core's cache throughout."""


@dataclass(frozen=True)
class ShardReport:
    """What a complete shard holds."""

    name: str
    samples: int
    bytes: int
    sha256: str
    tokens: dict[str, int]
    response_tokens: dict[str, int]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the stretch [start, stop) of the epoch."""

    number: int
    start: int
    stop: int


class _Window:
    """One domain's contiguous samples of a shard, in a few memory-mapped arrays.

    Buffers are read as they lie: Arrow's own conversions import pyarrow.compute or pandas, which takes longer than
    writing several shards.
    """

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self._arrays = [chunk for table in tables for chunk in table["mds"].chunks]
        self._offsets = [
            np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, 8 * array.offset) for array in self._arrays
        ]
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self._offsets)])
        self.tokens = _total(tables, "tokens")
        self.response_tokens = _total(tables, "response_tokens")

    def samples(self) -> Iterator[memoryview]:
        """The bytes of every sample, not copied; iterated in C."""
        return itertools.chain.from_iterable(map(_slices, self._arrays, self._offsets))


def _window(pool: Pool, position: int, count: int) -> _Window:
    """Raises DamageError when the pool's parts do not hold what pool.json says."""
    try:
        window = _Window(pool.window(position, count))
    except pa.ArrowException as error:
        raise DamageError(f"{pool.folder}: a part is not readable as Arrow ({error}): build the pool again") from None
    if len(window.lengths) != count:
        raise DamageError(f"{pool.folder}: its parts hold fewer samples than pool.json says: build the pool again")
    return window


def _slices(array: Any, offsets: npt.NDArray[np.int64]) -> Iterator[memoryview]:
    data, edges = memoryview(array.buffers()[2]), offsets.tolist()
    return map(data.__getitem__, map(slice, edges, edges[1:]))


def _recorded(record: Path, shard: Path) -> ShardReport | None:
    """What the record of a complete shard says, None unless that shard stands beside it."""
    try:
        report = ShardReport(**json.loads(record.read_bytes()))
        return report if shard.stat().st_size == report.bytes else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _total(tables: Sequence[pa.Table], column: str) -> int:
    chunks = (chunk for table in tables for chunk in table[column].chunks)
    return sum(
        int(np.frombuffer(chunk.buffers()[1], np.int32, len(chunk), 4 * chunk.offset).sum(dtype=np.int64))
        for chunk in chunks
    )


class ShardWriter:
    """Writes the shards of one epoch, each on its own and in any order."""

    def __init__(self, plan: Plan, pools: Mapping[str, Pool], shard_bytes: int) -> None:
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
        self._shard_bytes = shard_bytes

    def tasks(self) -> list[ShardTask]:
        """One task per shard, in order."""
        return [ShardTask(number, start, stop) for number, (start, stop) in enumerate(shard_bounds(self.plan))]

    def write(self, task: ShardTask, folder: Path) -> ShardReport:
        """Writes one shard into a folder, completely or not at all; a shard complete before is not written again."""
        path = folder / mds.shard_name(task.number)
        record = path.with_name(f"{path.name}.done")
        if (done := _recorded(record, path)) is not None:
            return done
        windows = self._windows(task)
        samples = task.stop - task.start
        expected = mds.header_bytes(samples, self._shard_bytes) + sum(int(window.lengths.sum()) for window in windows)
        with commit.staged(path, expected) as file:
            digest, size = hashlib.sha256(), 0
            for data in self._content(task, windows):
                digest.update(data)
                size += file.write(data)
            if size != expected:
                raise DamageError(f"{path}: came out at {size:,} bytes instead of {expected:,}: a pool is damaged")
        report = ShardReport(
            name=path.name,
            samples=samples,
            bytes=size,
            sha256=digest.hexdigest(),
            tokens={name: window.tokens for name, window in zip(self.plan.domains, windows, strict=True)},
            response_tokens={
                name: window.response_tokens for name, window in zip(self.plan.domains, windows, strict=True)
            },
        )
        # Not flushed: if the machine dies, a record that is not whole only has its shard written again.
        commit.write_staged(record, json.dumps(asdict(report)).encode(), flush=False)
        return report

    def content(self, task: ShardTask) -> Iterator[bytes]:
        """The bytes of a shard, in runs of about GATHER_BYTES."""
        return self._content(task, self._windows(task))

    def _content(self, task: ShardTask, windows: Sequence[_Window]) -> Iterator[bytes]:
        domains, _ = self._arrangement.stretch(task.start, task.stop)
        lengths = np.empty(len(domains), np.int64)
        for number, window in enumerate(windows):
            # Within a shard a domain's samples keep their order, so its lengths fall into place as they stand.
            lengths[domains == number] = window.lengths
        yield mds.header(lengths, self._shard_bytes)
        queues = [window.samples() for window in windows]
        step = max(1, GATHER_BYTES * len(lengths) // max(int(lengths.sum()), 1))
        for start in range(0, len(domains), step):
            # Each domain's next sample, domain after domain: iterated, sliced and joined in C, one copy in all.
            chosen = map(queues.__getitem__, domains[start : start + step].tolist())
            yield b"".join(map(next, chosen))

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
