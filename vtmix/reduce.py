"""From a domain's encoded parts to the parts of its pool, one range of keys at a time: the reduce side of building.

A worker puts a range in order, drops duplicates and leaks, and writes what is left. It holds no more than a few times
that at once, and needs to know of no other range.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vtmix import commit
from vtmix.errors import LISTED, Offenders
from vtmix.leaks import EvalSplits, leaks, named
from vtmix.pool import PART_SCHEMA, batch_rows, write_ipc
from vtmix.ranges import EncodedDomain, KeyRange, Split, SplitRange

PART_BYTES = 64 << 20
"""Bytes of encoded samples in a part of a pool, on average."""


@dataclass(frozen=True)
class ReduceTask:
    """One range of one split of a domain, and everything a worker needs to write its samples."""

    encoded: EncodedDomain
    split: Split
    number: int
    keys: KeyRange
    eval_splits: EvalSplits
    inputs: str
    """Fingerprint of what all the domains are made from: the leaks of one depend on the others' eval splits."""
    folder: Path

    @property
    def out(self) -> Path:
        """The file of the samples: PART_SCHEMA, in pool order."""
        return self.folder / f"{self.split}-{self.number:06d}.arrow"

    @property
    def record(self) -> Path:
        """The file that says what became of the range; the task is done when it exists."""
        return self.out.with_suffix(".json")


@dataclass(frozen=True)
class Reduced:
    """What became of one range: the size and digest of its file, and counts. Without samples there is no file."""

    task: ReduceTask
    samples: int
    tokens: int
    response_tokens: int
    sample_bytes: int
    max_sample_bytes: int
    duplicates: int
    leaks: Offenders
    bytes: int
    sha256: str


def reduce_range(task: ReduceTask) -> Reduced:
    """Writes the samples of one range, without duplicates and leaks; done before, it is read."""
    content = _recorded(task)
    if content is None:
        content = _reduce(task)
        # Not flushed: if the machine dies, a record that is not whole only has its range reduced again.
        commit.write_staged(task.record, json.dumps({"inputs": task.inputs, **content}).encode(), flush=False)
    total, lines = content.pop("leaks")
    return Reduced(task=task, leaks=Offenders(total, tuple(lines)), **content)


def _recorded(task: ReduceTask) -> dict[str, Any] | None:
    """What the record of a range says, if it was made from the same inputs and its file is complete."""
    try:
        content: dict[str, Any] = json.loads(task.record.read_bytes())
        complete = content.pop("inputs") == task.inputs and (
            not content["samples"] or task.out.stat().st_size == content["bytes"]
        )
    except (FileNotFoundError, ValueError):
        return None
    return content if complete else None


def _reduce(task: ReduceTask) -> dict[str, Any]:
    found = SplitRange(task.encoded, task.keys, task.split)
    samples, offenders = found.samples, Offenders(0, ())
    if task.split == "train":
        leaked = leaks(samples, task.eval_splits, task.keys)
        offenders = named(task.encoded.domain, leaked, found.where(leaked.head(LISTED)))
        samples = samples.join(leaked, on="sample_id", how="anti", maintain_order="left")
    size, digest = 0, ""
    if len(samples):
        rows = batch_rows(len(samples), int(samples["bytes"].sum()))
        write_ipc(task.out, found.gather(samples, PART_SCHEMA), rows)
        with task.out.open("rb") as file:
            size, digest = task.out.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "samples": len(samples),
        "tokens": int(samples["tokens"].sum()),
        "response_tokens": int(samples["response_tokens"].sum()),
        "sample_bytes": int(samples["bytes"].sum()),
        "max_sample_bytes": samples.select(pl.col("bytes").max()).item() or 0,
        "duplicates": found.duplicates,
        "leaks": offenders,
        "bytes": size,
        "sha256": digest,
    }
