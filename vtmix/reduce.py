"""From a domain's encoded parts to its pool: put in order, drop duplicates, set the eval split apart, write."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vtmix import commit, mds
from vtmix.artifacts import EvalSplit, PoolPart
from vtmix.parts import ENCODED_SCHEMA
from vtmix.pool import PART_SCHEMA, batch_rows, ipc_bytes, read_ipc

PART_BYTES = 64 << 20
EVAL_SHARD_BYTES = 1 << 26


class EncodedDomain:
    """The encoded parts of one domain, memory-mapped: its training samples and its eval split, each without duplicates
    and in pool order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._tables = [read_ipc(file) for file in files]
        empty = ENCODED_SCHEMA.empty_table()
        frames = [_frame(empty, -1), *(_frame(table, number) for number, table in enumerate(self._tables))]
        # Pool order, without the samples' bytes: `file` and `row` say where those are.
        order = pl.concat(frames).sort(["key", "sample_id", "file", "row"]).drop("key")
        self.samples = len(order)
        self.held_out = _unique(order.filter("held_out"))
        self.train = _unique(order.filter(~pl.col("held_out")))

    def where(self, rows: pl.DataFrame) -> list[str]:
        """The file and line each of the rows was read from."""
        return [self._tables[file]["where"][row].as_py() for file, row in rows.select("file", "row").iter_rows()]

    def gather(self, rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
        """The rows' columns in order, taken from the files they stand in."""
        groups = rows.with_row_index("position").partition_by("file")
        taken = [self._tables[group["file"][0]].select(schema.names).take(group["row"].to_arrow()) for group in groups]
        if not taken:
            return schema.empty_table()
        positions = pl.concat([group["position"] for group in groups])
        return pa.concat_tables(taken).combine_chunks().take(positions.arg_sort().to_arrow()).cast(schema)


def write_pool(folder: Path, encoded: EncodedDomain, leaks: Collection[str], texts: int) -> dict[str, Any]:
    """Writes a pool's files, without the training samples named in `leaks`; gives what pool.json says of them."""
    train = encoded.train.filter(~pl.col("sample_id").is_in(list(leaks)))
    _write_texts(folder, encoded, train.head(texts))
    return {
        "samples": len(train),
        "tokens": int(train["tokens"].sum()),
        "response_tokens": int(train["response_tokens"].sum()),
        "bytes": int(train["bytes"].sum()),
        "max_sample_bytes": train.select(pl.col("bytes").max()).item() or 0,
        "duplicates": encoded.samples - len(encoded.train) - len(encoded.held_out),
        "leaks_dropped": len(encoded.train) - len(train),
        "parts": tuple(_write_parts(folder, encoded, train)),
        "eval": _write_eval(folder / "eval", encoded),
    }


def _frame(table: pa.Table, number: int) -> pl.DataFrame:
    columns = table.select(["key", "sample_id", "held_out", "tokens", "response_tokens"])
    return pl.DataFrame(columns.append_column("bytes", pc.binary_length(table["mds"]))).with_columns(
        file=pl.lit(number, pl.Int32),
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    )


def _unique(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.unique("sample_id", keep="first", maintain_order=True)


def _write_parts(folder: Path, encoded: EncodedDomain, train: pl.DataFrame) -> Iterator[PoolPart]:
    for number, (start, stop) in enumerate(_stretches(train["bytes"].to_numpy(), PART_BYTES)):
        size = int(train["bytes"][start:stop].sum())
        data = ipc_bytes(encoded.gather(train[start:stop], PART_SCHEMA), batch_rows(stop - start, size))
        name = f"part-{number:05d}.arrow"
        commit.write_staged(folder / name, data)
        yield PoolPart(
            name=name,
            samples=stop - start,
            tokens=int(train["tokens"][start:stop].sum()),
            response_tokens=int(train["response_tokens"][start:stop].sum()),
            sample_bytes=size,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )


def _write_texts(folder: Path, encoded: EncodedDomain, rows: pl.DataFrame) -> None:
    schema = pa.schema([ENCODED_SCHEMA.field("sample_id"), ENCODED_SCHEMA.field("text")])
    sink = pa.BufferOutputStream()
    pq.write_table(encoded.gather(rows, schema), sink)
    commit.write_staged(folder / "texts.parquet", sink.getvalue().to_pybytes())


def _write_eval(folder: Path, encoded: EncodedDomain) -> EvalSplit:
    rows = encoded.held_out
    commit.make_folder(folder)
    shards = []
    layout = mds.Layout(EVAL_SHARD_BYTES)
    most = EVAL_SHARD_BYTES - layout.header_bytes(0)
    for number, (start, stop) in enumerate(_stretches(rows["bytes"].to_numpy() + 4, most)):
        lengths = rows["bytes"][start:stop].to_numpy()
        samples = encoded.gather(rows[start:stop], PART_SCHEMA)["mds"].to_pylist()
        data = layout.header(lengths) + b"".join(samples)
        commit.write_staged(folder / mds.shard_name(number), data)
        shards.append(mds.ShardSize(stop - start, len(data)))
    commit.write_staged(folder / mds.INDEX, layout.index(shards))
    return EvalSplit(
        samples=len(rows),
        tokens=int(rows["tokens"].sum()),
        response_tokens=int(rows["response_tokens"].sum()),
        digest=hashlib.sha256("\n".join(rows["sample_id"]).encode()).hexdigest(),
    )


def _stretches(lengths: npt.NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive stretches [start, stop) that each take at most `most`, or hold a single element."""
    ends = np.cumsum(lengths)
    start, before = 0, 0
    while start < len(lengths):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield start, stop
        start, before = stop, int(ends[stop - 1])
