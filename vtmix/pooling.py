"""Builds pools: maps over the parts of the sources (encode), then reduces per domain (order, drop duplicates, set the
eval split apart, write). The result does not depend on how the sources were cut or on how many workers ran.
"""

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vtmix import commit, distribute, mds, progress
from vtmix.artifacts import EvalSplit, Inputs, PoolManifest, PoolPart, fingerprint, run_folder
from vtmix.config import Encoding, LanguageModel, MixtureConfig
from vtmix.encode import Encoded, Encoder, load_tokenizer, tokenizer_digest
from vtmix.errors import LeakError, RecordError, listing
from vtmix.pool import PART_SCHEMA, open_pool, read_ipc
from vtmix.records import BadRecord, Conversation, Invalid, Part, open_source, read_part, sample_id, text_of

PART_BYTES = 64 << 20
ENCODED_SCHEMA = pa.schema(
    {
        "key": pa.uint64(),
        "held_out": pa.bool_(),
        "where": pa.string(),
        "text": pa.string(),
        **{field.name: field.type for field in PART_SCHEMA},
    }
)
EVAL_SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class EncodeTask:
    """One part of a source, and everything a worker needs to encode it."""

    domain: str
    part: Part
    eval_source: bool
    model: str
    revision: str | None
    encoding: Encoding
    seed: int
    eval_fraction: float | None
    texts: int
    out: Path


@dataclass(frozen=True)
class Encodings:
    """What became of one part: its file of encoded samples, and counts."""

    task: EncodeTask
    records: int
    rejected: tuple[BadRecord, ...]
    truncated: int
    overlong_dropped: int


@dataclass(frozen=True)
class _Building:
    """One domain on its way to a pool."""

    domain: str
    inputs: Inputs
    final: Path
    staging: Path
    tasks: tuple[EncodeTask, ...]


def build(
    config: MixtureConfig,
    *,
    folder: Path | None = None,
    model: LanguageModel | None = None,
    backend: distribute.Backend = "processes",
    workers: int | None = None,
) -> dict[str, PoolManifest]:
    """Builds every domain's pool that is not committed yet, and returns all of them.

    `folder` and `model` (defaults: the run's) give another place and another tokenizer. Raises RecordError naming every
    record that cannot be used, LeakError naming training samples that stand in an eval split, ConflictError where a
    pool exists that was made from other inputs; then nothing is published.
    """
    folder = folder or run_folder(config).pools
    with commit.lock(folder, "pool"):
        pools, buildings = _outstanding(config, folder, model or config.model)
        if not buildings:
            return pools
        encodings = _encode_all(buildings, backend, workers)
        _refuse_bad_records(encodings, config)
        eval_ids = _eval_ids(buildings, pools, folder)
        leaks = {building.domain: _leaks(building, eval_ids) for building in buildings}
        if config.pool.leak == "stop":
            _refuse_leaks(leaks, _committed_leaks(buildings, pools, folder))
        for building in buildings:
            mine = [found for found in encodings if found.task.domain == building.domain]
            pools[building.domain] = _reduce(building, mine, leaks[building.domain], config)
    return {name: pools[name] for name in config.domains}


def _outstanding(
    config: MixtureConfig, folder: Path, model: LanguageModel
) -> tuple[dict[str, PoolManifest], list[_Building]]:
    location = config.model_location(model)
    digest = tokenizer_digest(load_tokenizer(location, model.revision))
    pools, buildings = {}, []
    for domain in config.domains:
        opened = {
            split: [open_source(source, config) for source in getattr(config.domains[domain], split)]
            for split in ("train", "eval")
        }
        inputs = _inputs(config, domain, digest, {split: [s.digests for s in opened[split]] for split in opened})
        final = folder / domain
        committed = PoolManifest.committed(final / "pool.json", inputs)
        if committed is not None:
            pools[domain] = committed
            continue
        staging = commit.staging_folder(final, fingerprint(inputs))
        parts = [(part, split == "eval") for split in opened for source in opened[split] for part in source.parts]
        tasks = tuple(
            EncodeTask(
                domain=domain,
                part=part,
                eval_source=is_eval,
                model=location,
                revision=model.revision,
                encoding=config.encoding,
                seed=config.pool.seed,
                eval_fraction=None if config.domains[domain].eval else config.pool.eval_fraction,
                texts=config.pool.texts,
                out=staging / "encoded" / f"{number:06d}.arrow",
            )
            for number, (part, is_eval) in enumerate(parts)
        )
        buildings.append(_Building(domain, inputs, final, staging, tasks))
    return pools, buildings


def _inputs(config: MixtureConfig, domain: str, tokenizer: str, digests: Mapping[str, Any]) -> Inputs:
    """What a pool is made from."""
    settings = config.domains[domain].model_dump(mode="json")
    return {
        "encoding": config.encoding.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "seed": config.pool.seed,
        "eval_fraction": None if config.domains[domain].eval else config.pool.eval_fraction,
        "leak": config.pool.leak,
        "texts": config.pool.texts,
        "sources": settings,
        "files": digests,
    }


def _encode_all(buildings: Sequence[_Building], backend: distribute.Backend, workers: int | None) -> list[Encodings]:
    tasks = [task for building in buildings for task in building.tasks]
    for building in buildings:
        (building.staging / "encoded").mkdir(exist_ok=True)
    workers = min(workers or distribute.cores(), max(len(tasks), 1))
    found = []
    with progress.bar("encoding records", len(tasks), "parts") as advance:
        for encodings in distribute.run(encode_part, tasks, backend=backend, workers=workers):
            found.append(encodings)
            advance(1)
    return sorted(found, key=lambda done: done.task.out)


@functools.lru_cache(maxsize=2)
def _encoder(model: str, revision: str | None, encoding: str) -> Encoder:
    return Encoder(load_tokenizer(model, revision), Encoding.model_validate_json(encoding))


def encode_part(task: EncodeTask) -> Encodings:
    """Encodes one part of a source into an Arrow file of ENCODED_SCHEMA, in pool order; done before, it is read."""
    if task.out.exists():
        with pa.memory_map(str(task.out)) as file:
            return _from_metadata(task, pa.ipc.open_file(file).schema.metadata[b"vtmix"])
    encoder = _encoder(task.model, task.revision, task.encoding.model_dump_json())
    rows: list[dict[str, Any]] = []
    rejected: list[BadRecord] = []
    records = truncated = dropped = 0
    for item in read_part(task.part):
        records += 1
        if isinstance(item, BadRecord):
            rejected.append(item)
            continue
        where, turns = item
        try:
            encoded = encoder.encode(turns)
        except Invalid as invalid:
            rejected.append(BadRecord(where, str(invalid)))
            continue
        cut = encoded is not None and encoded.truncated
        if encoded is None or (cut and task.encoding.overlong == "drop"):
            dropped += 1
            continue
        truncated += cut
        rows.append(_row(task, where, turns, encoded))
    result = Encodings(task, records, tuple(rejected), truncated, dropped)
    commit.write_staged(task.out, _encoded_file(rows, result))
    return result


def _row(task: EncodeTask, where: str, turns: Conversation, encoded: Encoded) -> dict[str, Any]:
    identity = sample_id(turns)
    sample = mds.Sample(domain=task.domain, input_ids=encoded.input_ids, labels=encoded.labels, sample_id=identity)
    held_out = task.eval_source or (
        task.eval_fraction is not None and _hash(identity, task.seed, "held out") < task.eval_fraction * 2**64
    )
    return {
        "key": _hash(identity, task.seed, "order"),
        "held_out": held_out,
        "where": where,
        "text": text_of(turns),
        "sample_id": identity,
        "tokens": len(encoded.input_ids),
        "response_tokens": encoded.response_tokens,
        "mds": mds.encode_sample(sample),
    }


def _hash(identity: str, seed: int, purpose: str) -> int:
    """64 bits of a keyed hash of a sample id."""
    key = f"{purpose} {seed}".encode()
    return int.from_bytes(hashlib.blake2b(identity.encode(), key=key, digest_size=8).digest(), "big")


def _encoded_file(rows: list[dict[str, Any]], result: Encodings) -> bytes:
    rows.sort(key=lambda row: (row["key"], row["sample_id"]))
    kept = 0
    for row in rows:  # only the first texts in pool order can be among the domain's first
        if row["held_out"] or kept >= result.task.texts:
            row["text"] = None
        else:
            kept += 1
    metadata = {
        "records": result.records,
        "rejected": result.rejected,
        "truncated": result.truncated,
        "overlong_dropped": result.overlong_dropped,
    }
    schema = ENCODED_SCHEMA.with_metadata({"vtmix": json.dumps(metadata)})
    return _ipc_bytes(pa.Table.from_pylist(rows, schema=schema))


def _from_metadata(task: EncodeTask, raw: bytes) -> Encodings:
    content = json.loads(raw)
    content["rejected"] = tuple(BadRecord(*bad) for bad in content["rejected"])
    return Encodings(task=task, **content)


def _ipc_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _refuse_bad_records(encodings: Sequence[Encodings], config: MixtureConfig) -> None:
    bad = [f"{found.where}: {found.why}" for part in encodings for found in part.rejected]
    if len(bad) > config.pool.max_bad_records:
        raise RecordError(
            f"{len(bad)} of {sum(part.records for part in encodings):,} records cannot be used "
            f"(pool.max_bad_records is {config.pool.max_bad_records}), no pool was built:\n  {listing(bad, 100)}"
        )


def _order(building: _Building) -> pl.DataFrame:
    """The encoded samples of a domain in pool order, without their bytes; `file` and `row` say where those are."""
    frames = [
        pl.from_arrow(read_ipc(task.out).select(["key", "sample_id", "held_out", "where"]))
        .with_columns(file=pl.lit(number, pl.Int32))  # type: ignore[union-attr]
        .with_row_index("row")
        for number, task in enumerate(building.tasks)
    ]
    if not frames:
        return pl.DataFrame(schema={"key": pl.UInt64, "sample_id": pl.String, "held_out": pl.Boolean})
    return pl.concat(frames).sort(["key", "sample_id", "file", "row"])


def _eval_ids(buildings: Sequence[_Building], pools: Mapping[str, PoolManifest], folder: Path) -> dict[str, str]:
    """Every sample id that stands in an eval split, with its domain."""
    found = {sample["sample_id"]: domain for domain in pools for sample in mds.Samples(folder / domain / "eval")}
    for building in buildings:
        held_out = _order(building).filter("held_out")["sample_id"].to_list()
        found |= dict.fromkeys(held_out, building.domain)
    return found


def _leaks(building: _Building, eval_ids: Mapping[str, str]) -> dict[str, str]:
    """Training samples of a domain that stand in an eval split: id → a sentence that names both places."""
    train = _order(building).filter(~pl.col("held_out"))
    hits = train.filter(pl.col("sample_id").is_in(list(eval_ids)))
    return {
        identity: f"{where}: sample {identity} of '{building.domain}' also stands in the eval split of "
        f"'{eval_ids[identity]}'"
        for where, identity in hits.select("where", "sample_id").iter_rows()
    }


def _committed_leaks(buildings: Sequence[_Building], pools: Mapping[str, PoolManifest], folder: Path) -> dict[str, str]:
    """Training samples of pools committed before that stand in an eval split built now."""
    fresh = {
        identity: building.domain
        for building in buildings
        for identity in _order(building).filter("held_out")["sample_id"]
    }
    return {
        identity: f"sample {identity} of '{domain}' (committed) also stands in the eval split of '{fresh[identity]}'"
        for domain in pools
        for identity in open_pool(folder / domain).sample_ids()
        if identity in fresh
    }


def _refuse_leaks(leaks: Mapping[str, Mapping[str, str]], committed: Mapping[str, str]) -> None:
    lines = [line for found in (*leaks.values(), committed) for line in found.values()]
    if lines:
        raise LeakError(
            f"{len(lines)} training samples also stand in an eval split, no pool was built "
            f"(remove them, or set pool.leak to 'drop'):\n  {listing(lines, 100)}"
        )


def _reduce(
    building: _Building, encodings: Sequence[Encodings], leaks: Mapping[str, str], config: MixtureConfig
) -> PoolManifest:
    """Writes and publishes one domain's pool."""
    order = _order(building)
    unique = order.unique(["sample_id", "held_out"], keep="first", maintain_order=True)
    held_out = unique.filter("held_out")
    train = unique.filter(~pl.col("held_out") & ~pl.col("sample_id").is_in(list(leaks)))
    tables = [read_ipc(task.out) for task in building.tasks]
    parts, totals = _write_parts(building.staging, tables, train)
    _write_texts(building.staging, tables, train.head(config.pool.texts))
    manifest = PoolManifest(
        inputs=building.inputs,
        domain=building.domain,
        samples=len(train),
        records=sum(part.records for part in encodings),
        rejected=sum(len(part.rejected) for part in encodings),
        duplicates=len(order) - len(unique),
        truncated=sum(part.truncated for part in encodings),
        overlong_dropped=sum(part.overlong_dropped for part in encodings),
        leaks_dropped=len(unique) - len(held_out) - len(train),
        eval=_write_eval(building.staging / "eval", tables, held_out),
        parts=tuple(parts),
        **totals,
    )
    del tables
    shutil.rmtree(building.staging / "encoded", ignore_errors=True)
    commit.write_staged(building.staging / "pool.json", manifest.text())
    commit.publish_folder(building.staging, building.final)
    return manifest


def _gather(tables: Sequence[pa.Table], rows: pl.DataFrame, columns: Sequence[str]) -> pa.Table:
    """The rows' columns in order, taken from the tables they stand in."""
    chosen = [tables[file].select(columns).take(group["row"].to_arrow()) for (file,), group in _by_file(rows)]
    if not chosen:
        return pa.table({name: pa.array([], ENCODED_SCHEMA.field(name).type) for name in columns})
    positions = np.concatenate([group["position"].to_numpy() for _, group in _by_file(rows)])
    return pa.concat_tables(chosen).combine_chunks().take(np.argsort(positions))


def _by_file(rows: pl.DataFrame) -> Iterator[tuple[tuple[Any, ...], pl.DataFrame]]:
    yield from rows.with_row_index("position").group_by(["file"], maintain_order=True)


def _write_parts(
    staging: Path, tables: Sequence[pa.Table], train: pl.DataFrame
) -> tuple[list[PoolPart], dict[str, int]]:
    totals = {"tokens": 0, "response_tokens": 0, "bytes": 0, "max_sample_bytes": 0}
    parts = []
    for number, rows in enumerate(_cut(tables, train)):
        table = _gather(tables, rows, PART_SCHEMA.names)
        lengths = pa.compute.binary_length(table["mds"]).to_numpy()
        totals["tokens"] += pa.compute.sum(table["tokens"]).as_py()
        totals["response_tokens"] += pa.compute.sum(table["response_tokens"]).as_py()
        totals["bytes"] += int(lengths.sum())
        totals["max_sample_bytes"] = max(totals["max_sample_bytes"], int(lengths.max()))
        data = _ipc_bytes(table.cast(PART_SCHEMA))
        name = f"part-{number:05d}.arrow"
        commit.write_staged(staging / name, data)
        parts.append(PoolPart(name=name, samples=len(rows), bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return parts, totals


def _cut(tables: Sequence[pa.Table], train: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Pool order cut into parts of about PART_BYTES."""
    if not len(train):
        return
    sizes = [pa.compute.binary_length(table["mds"]).to_numpy() for table in tables]
    lengths = np.empty(len(train), np.int64)
    files, rows = train["file"].to_numpy(), train["row"].to_numpy()
    for number, found in enumerate(sizes):
        mine = files == number
        lengths[mine] = found[rows[mine]]
    part = (np.cumsum(lengths) - lengths) // PART_BYTES
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(train)]
    for start, stop in itertools.pairwise(edges):
        yield train.slice(start, stop - start)


def _write_texts(staging: Path, tables: Sequence[pa.Table], rows: pl.DataFrame) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(_gather(tables, rows, ["sample_id", "text"]), sink)
    commit.write_staged(staging / "texts.parquet", sink.getvalue().to_pybytes())


def _write_eval(folder: Path, tables: Sequence[pa.Table], rows: pl.DataFrame) -> EvalSplit:
    folder.mkdir(exist_ok=True)
    table = _gather(tables, rows, PART_SCHEMA.names)
    samples = table["mds"].to_pylist()
    sizes = []
    for number, chunk in enumerate(_chunks(samples)):
        lengths = np.array([len(sample) for sample in chunk], np.int64)
        data = mds.header(lengths, EVAL_SHARD_BYTES) + b"".join(chunk)
        commit.write_staged(folder / mds.shard_name(number), data)
        sizes.append((len(chunk), len(data)))
    commit.write_staged(folder / mds.INDEX, mds.index(sizes, EVAL_SHARD_BYTES))
    identities = table["sample_id"].to_pylist()
    return EvalSplit(
        samples=len(identities),
        tokens=sum(table["tokens"].to_pylist()),
        response_tokens=sum(table["response_tokens"].to_pylist()),
        digest=hashlib.sha256("\n".join(identities).encode()).hexdigest(),
    )


def _chunks(samples: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Samples in runs that fit a shard."""
    chunk: list[bytes] = []
    size = mds.header_bytes(0, EVAL_SHARD_BYTES)
    for sample in samples:
        if chunk and size + len(sample) + 4 > EVAL_SHARD_BYTES:
            yield chunk
            chunk, size = [], mds.header_bytes(0, EVAL_SHARD_BYTES)
        chunk.append(sample)
        size += len(sample) + 4
    if chunk:
        yield chunk
