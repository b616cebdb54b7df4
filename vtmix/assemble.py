"""From the reduced ranges of a domain to the files of its pool. Nothing here is held for all samples at once."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vtmix import commit, mds
from vtmix.artifacts import EvalSplit, PoolPart
from vtmix.pool import read_ipc
from vtmix.ranges import ENCODED_SCHEMA, SplitRange
from vtmix.reduce import Reduced

EVAL_SHARD_BYTES = 1 << 26


def write_pool(folder: Path, train: Sequence[Reduced], held_out: Sequence[Reduced], texts: int) -> dict[str, Any]:
    """Writes a pool's files from its reduced ranges, in order; gives what pool.json says of them."""
    commit.make_folder(folder)
    _write_texts(folder, train, texts)
    return {
        "samples": sum(part.samples for part in train),
        "tokens": sum(part.tokens for part in train),
        "response_tokens": sum(part.response_tokens for part in train),
        "bytes": sum(part.sample_bytes for part in train),
        "max_sample_bytes": max((part.max_sample_bytes for part in train), default=0),
        "duplicates": sum(part.duplicates for part in (*train, *held_out)),
        "leaks_dropped": sum(part.leaks.total for part in train),
        "parts": tuple(_linked(folder, part) for part in train if part.samples),
        "eval": _write_eval(folder / "eval", held_out),
    }


def _linked(folder: Path, part: Reduced) -> PoolPart:
    name = f"part-{part.task.number:05d}.arrow"
    commit.link_staged(part.task.out, folder / name)
    return PoolPart(
        name=name,
        samples=part.samples,
        tokens=part.tokens,
        response_tokens=part.response_tokens,
        sample_bytes=part.sample_bytes,
        bytes=part.bytes,
        sha256=part.sha256,
    )


def _write_texts(folder: Path, train: Sequence[Reduced], most: int) -> None:
    schema = pa.schema([ENCODED_SCHEMA.field("sample_id"), ENCODED_SCHEMA.field("text")])
    tables = [schema.empty_table()]
    for part in (part for part in train if part.samples):
        if most <= 0:
            break
        kept = read_ipc(part.task.out)["sample_id"].slice(0, most)
        found = SplitRange(part.task.encoded, part.task.keys, "train")
        tables.append(found.gather(found.samples.filter(pl.col("sample_id").is_in(kept.to_pylist())), schema))
        most -= len(kept)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables).combine_chunks(), sink)
    commit.write_staged(folder / "texts.parquet", sink.getvalue().to_pybytes())


def _write_eval(folder: Path, parts: Sequence[Reduced]) -> EvalSplit:
    commit.make_folder(folder)
    layout = mds.Layout(EVAL_SHARD_BYTES)
    files = [part.task.out for part in parts if part.samples]
    shards = []
    for number, samples in enumerate(_shards(value for file in files for value in read_ipc(file)["mds"])):
        lengths = np.array([len(sample) for sample in samples], np.int64)
        data = layout.header(lengths) + b"".join(samples)
        commit.write_staged(folder / mds.shard_name(number), data)
        shards.append(mds.ShardSize(len(samples), len(data)))
    commit.write_staged(folder / mds.INDEX, layout.index(shards))
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        digest.update(("\n" if number else "").encode() + "\n".join(read_ipc(file)["sample_id"].to_pylist()).encode())
    return EvalSplit(
        samples=sum(part.samples for part in parts),
        tokens=sum(part.tokens for part in parts),
        response_tokens=sum(part.response_tokens for part in parts),
        digest=digest.hexdigest(),
    )


def _shards(values: Iterable[Any]) -> Iterator[list[pa.Buffer]]:
    """Encoded samples in order, cut into shards of at most EVAL_SHARD_BYTES each, or of a single sample."""
    empty = mds.Layout(EVAL_SHARD_BYTES).header_bytes(0)
    samples: list[pa.Buffer] = []
    size = empty
    for value in values:
        sample = value.as_buffer()
        size += 4 + len(sample)
        if samples and size > EVAL_SHARD_BYTES:
            yield samples
            samples, size = [], empty + 4 + len(sample)
        samples.append(sample)
    if samples:
        yield samples
