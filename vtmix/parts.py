"""Encodes one part of a source: the map side of building a pool, which any worker can do on its own."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vtmix import mds
from vtmix.encode import Encoded, Encoder, load_tokenizer, tokenizer_digest
from vtmix.errors import LISTED, ConfigError, Offenders
from vtmix.pool import write_ipc
from vtmix.ranges import ENCODED_SCHEMA, Split, order_key, sample_hash
from vtmix.records import BadRecord, Conversation, Invalid, sample_id, text_of
from vtmix.settings import Encoding
from vtmix.sources import Part, read_part

ENVIRONMENT = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Of a process that does nothing but encode, beside others that do the same: without torch, transformers is imported in
a fifth of the time.
"""


@dataclass(frozen=True)
class EncodeTask:
    """One part of a source, and everything a worker needs to encode it."""

    domain: str
    part: Part
    eval_source: bool
    model: str
    revision: str | None
    tokenizer: str
    encoding: Encoding
    seed: int
    eval_fraction: float | None
    out: Path


@dataclass(frozen=True)
class Encodings:
    """What became of one part: its file of encoded samples, and counts."""

    task: EncodeTask
    records: int
    rejected: Offenders
    truncated: int
    overlong_dropped: int
    sample_bytes: dict[Split, int]
    """Bytes of the encoded samples, duplicates included: the same in all, however the sources are cut."""


def encode_part(task: EncodeTask) -> Encodings:
    """Encodes one part of a source into an Arrow file of ENCODED_SCHEMA, in pool order; done before, it is read."""
    if task.out.exists():
        with pa.memory_map(str(task.out)) as file:
            return _from_metadata(task, pa.ipc.open_file(file).schema.metadata[b"vtmix"])
    encoder = _encoder(task.model, task.revision, task.tokenizer, task.encoding.model_dump_json())
    rows: list[dict[str, Any]] = []
    rejected: list[str] = []
    records = truncated = dropped = 0
    for item in _encoded(encoder, list(read_part(task.part))):
        records += 1
        if isinstance(item, BadRecord):
            rejected.append(f"{item.where}: {item.why}")
            continue
        where, turns, encoded = item
        cut = encoded is not None and encoded.truncated
        if encoded is None or (cut and task.encoding.overlong == "drop"):
            dropped += 1
            continue
        truncated += cut
        rows.append(_row(task, where, turns, encoded))
    result = Encodings(
        task=task,
        records=records,
        rejected=Offenders(len(rejected), tuple(rejected[:LISTED])),
        truncated=truncated,
        overlong_dropped=dropped,
        sample_bytes={
            "train": sum(len(row["mds"]) for row in rows if not row["held_out"]),
            "eval": sum(len(row["mds"]) for row in rows if row["held_out"]),
        },
    )
    write_ipc(task.out, _table(rows, result))
    return result


def _encoded(
    encoder: Encoder, items: Sequence[tuple[str, Conversation] | BadRecord]
) -> Iterator[tuple[str, Conversation, Encoded | None] | BadRecord]:
    """Every record with its encoding, or why it has none, in order."""
    encodings = encoder.encode_all(item[1] for item in items if not isinstance(item, BadRecord))
    for item in items:
        if isinstance(item, BadRecord):
            yield item
            continue
        encoded = next(encodings)
        yield BadRecord(item[0], str(encoded)) if isinstance(encoded, Invalid) else (*item, encoded)


@functools.lru_cache(maxsize=2)
def _encoder(model: str, revision: str | None, digest: str, encoding: str) -> Encoder:
    tokenizer = load_tokenizer(model, revision)
    if tokenizer_digest(tokenizer) != digest:
        raise ConfigError(f"model: {model!r} gives a worker another tokenizer than it gave at the start of the build")
    return Encoder(tokenizer, Encoding.model_validate_json(encoding))


def _row(task: EncodeTask, where: str, turns: Conversation, encoded: Encoded) -> dict[str, Any]:
    identity = sample_id(turns)
    sample = mds.Sample(domain=task.domain, input_ids=encoded.input_ids, labels=encoded.labels, sample_id=identity)
    held_out = task.eval_source or (
        task.eval_fraction is not None and sample_hash(identity, task.seed, "held out") < task.eval_fraction * 2**64
    )
    return {
        "key": order_key(identity, task.seed),
        "held_out": held_out,
        "where": where,
        "text": None if held_out else text_of(turns),
        "sample_id": identity,
        "tokens": len(encoded.input_ids),
        "response_tokens": encoded.response_tokens,
        "mds": mds.encode_sample(sample),
    }


def _table(rows: list[dict[str, Any]], result: Encodings) -> pa.Table:
    rows.sort(key=lambda row: (row["key"], row["sample_id"]))
    metadata = {
        "records": result.records,
        "rejected": result.rejected,
        "truncated": result.truncated,
        "overlong_dropped": result.overlong_dropped,
        "sample_bytes": result.sample_bytes,
    }
    schema = ENCODED_SCHEMA.with_metadata({"vtmix": json.dumps(metadata)})
    return pa.Table.from_pylist(rows, schema=schema)


def _from_metadata(task: EncodeTask, raw: bytes) -> Encodings:
    content = json.loads(raw)
    total, lines = content.pop("rejected")
    return Encodings(task=task, rejected=Offenders(total, tuple(lines)), **content)
