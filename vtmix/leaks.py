"""Leaks: training samples that also stand in an eval split, of whichever domain, found range by range of keys."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from vtmix import mds
from vtmix.errors import LISTED, Offenders
from vtmix.pool import open_pool
from vtmix.ranges import EncodedDomain, KeyRange, order_key
from vtmix.stores import Store


@dataclass(frozen=True)
class CommittedPool:
    """A pool that stands already. One written by hand need not be in pool order."""

    domain: str
    folder: Path
    in_order: bool
    store: Store | None = None

    def held_out(self, keys: KeyRange, seed: int) -> list[str]:
        """The ids of its held-out samples in a range of keys, and perhaps of others where it is not in order."""
        samples = mds.Samples(self.folder / "eval")
        start, stop = 0, len(samples)
        if self.in_order:

            def key(sample: mds.Sample) -> int:
                return order_key(sample["sample_id"], seed)

            start, stop = bisect_left(samples, keys.first, key=key), bisect_right(samples, keys.last, key=key)
        return [samples[number]["sample_id"] for number in range(start, stop)]


@dataclass(frozen=True)
class EvalSplits:
    """The eval splits that training samples are held against: of domains on their way, and of committed pools."""

    encoded: tuple[EncodedDomain, ...]
    committed: tuple[CommittedPool, ...]
    seed: int

    def within(self, keys: KeyRange) -> pl.DataFrame:
        """The samples held out in a range of keys: sample_id, and the domain that holds it out (`held_by`)."""
        schema = {"sample_id": pl.String, "held_by": pl.String}
        found = [pl.DataFrame({"sample_id": ids, "held_by": name}, schema) for name, ids in self._ids(keys)]
        return pl.concat([pl.DataFrame(schema=schema), *found]).unique("sample_id", keep="first", maintain_order=True)

    def _ids(self, keys: KeyRange) -> Iterator[tuple[str, list[str]]]:
        for domain in self.encoded:
            rows = domain.rows(keys).select(["sample_id", "held_out"])
            yield domain.domain, rows.filter(rows["held_out"])["sample_id"].to_pylist()
        for pool in self.committed:
            yield pool.domain, pool.held_out(keys, self.seed)


def leaks(samples: pl.DataFrame, splits: EvalSplits, keys: KeyRange) -> pl.DataFrame:
    """Those of the samples (sample_id, …) that stand in an eval split, with a further column `held_by`."""
    return samples.join(splits.within(keys), on="sample_id", maintain_order="left")


def named(domain: str, found: pl.DataFrame, where: Sequence[str]) -> Offenders:
    """Leaks of a domain in words; `where` says where the first LISTED of them, or more, were read from."""
    lines = (
        f"{place}: sample {row['sample_id']} of '{domain}' also stands in the eval split of '{row['held_by']}'"
        for place, row in zip(where, found.head(LISTED).iter_rows(named=True), strict=False)
    )
    return Offenders(len(found), tuple(lines))


@dataclass(frozen=True)
class CommittedPart:
    """One part of a committed pool, to be held against the eval splits of domains on their way."""

    pool: CommittedPool
    number: int
    splits: EvalSplits


def committed_leaks(task: CommittedPart) -> Offenders:
    """The leaks of one part of a committed pool."""
    ids = open_pool(task.pool.folder, task.pool.store).part(task.number, ["sample_id"])["sample_id"].to_pylist()
    keys = [order_key(identity, task.splits.seed) for identity in ids]
    found = leaks(pl.DataFrame({"sample_id": ids}), task.splits, KeyRange(min(keys), max(keys)))
    return named(task.pool.domain, found, [str(task.pool.folder)] * len(found))
