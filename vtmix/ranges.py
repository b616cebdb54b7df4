"""Ranges of keys: the stretch of a domain that one worker holds at a time, however large the domain is.

A sample's key is a keyed hash of its id. Keys are spread evenly over 64 bits, so equal ranges hold about as many bytes;
and equal samples have equal keys, in whichever part or domain they stand, so they meet in one range.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from vtmix.pool import PART_SCHEMA, read_ipc

KEYS = 1 << 64
ENCODED_SCHEMA = pa.schema(
    {
        "key": pa.uint64(),
        "held_out": pa.bool_(),
        "where": pa.string(),
        "text": pa.large_string(),
        **{field.name: field.type for field in PART_SCHEMA},
    }
)

Split = Literal["train", "eval"]


def sample_hash(identity: str, seed: int, purpose: str) -> int:
    """64 bits of a keyed hash of a sample id."""
    key = f"{purpose} {seed}".encode()
    return int.from_bytes(hashlib.blake2b(identity.encode(), key=key, digest_size=8).digest(), "big")


def order_key(identity: str, seed: int) -> int:
    """The key of a sample, in [0, 2^64): pool order is the order of (key, sample id)."""
    return sample_hash(identity, seed, "order")


@dataclass(frozen=True)
class KeyRange:
    """The keys from `first` to `last`, both included."""

    first: int
    last: int


def key_ranges(size: int, most: int) -> list[KeyRange]:
    """All keys in equal ranges: the fewest that hold at most `most` of `size` bytes on average; of no bytes, none."""
    count = -(-size // most)
    return [KeyRange(number * KEYS // count, (number + 1) * KEYS // count - 1) for number in range(count)]


@dataclass(frozen=True)
class EncodedDomain:
    """Where the encoded parts of a domain stand: files of ENCODED_SCHEMA, one per part of its sources, in their order.

    The rows of each are sorted by (key, sample_id).
    """

    domain: str
    folder: Path
    parts: int

    def part(self, number: int) -> Path:
        """The file of one part."""
        return self.folder / f"{number:06d}.arrow"

    def rows(self, keys: KeyRange) -> pa.Table:
        """The rows of a range, part after part, memory-mapped: ENCODED_SCHEMA."""
        found = [_within(read_ipc(self.part(number)), keys) for number in range(self.parts)]
        return pa.concat_tables([ENCODED_SCHEMA.empty_table(), *found])


def _within(table: pa.Table, keys: KeyRange) -> pa.Table:
    if not len(table):
        return table
    column = table["key"].chunk(0).to_numpy()
    start = int(np.searchsorted(column, np.uint64(keys.first), side="left"))
    stop = int(np.searchsorted(column, np.uint64(keys.last), side="right"))
    return table.slice(start, stop - start)


class SplitRange:
    """The samples of one split of a domain in a range of keys: in pool order, the first of equal ones in source order.

    `samples` has the columns sample_id, tokens, response_tokens, bytes (of the encoded sample), and `row`, which says
    where the sample stands; `duplicates` counts those left out.
    """

    def __init__(self, encoded: EncodedDomain, keys: KeyRange, split: Split) -> None:
        self._rows = encoded.rows(keys)
        columns = self._rows.select(["key", "sample_id", "held_out", "tokens", "response_tokens"])
        index = pl.DataFrame(columns.append_column("bytes", pc.binary_length(self._rows["mds"]))).with_row_index("row")
        ordered = index.filter(pl.col("held_out") == (split == "eval")).sort(["key", "sample_id", "row"])
        self.samples = ordered.drop("key", "held_out").unique("sample_id", keep="first", maintain_order=True)
        self.duplicates = len(ordered) - len(self.samples)

    def where(self, samples: pl.DataFrame) -> list[str]:
        """The file and line each of the samples was read from."""
        found: list[str] = self._rows["where"].take(samples["row"].to_arrow()).to_pylist()
        return found

    def gather(self, samples: pl.DataFrame, schema: pa.Schema) -> pa.Table:
        """The columns of `schema` of some samples, in their order."""
        rows = samples["row"].to_numpy()
        chosen = np.zeros(len(self._rows), bool)
        chosen[rows] = True
        # Chosen before they are put in order, since Arrow copies all there is to choose from: a sample that is repeated
        # without end would not fit.
        found = self._rows.select(schema.names).filter(pa.array(chosen))
        return found.take(pa.array(rows.argsort().argsort())).combine_chunks().cast(schema)
