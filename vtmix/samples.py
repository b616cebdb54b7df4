"""The sampled texts of a detection, as Parquet: one part per block, and what may stand in it.

detection/iteration-01/part-00000.parquet holds, for each sample of the block:

    iteration      int32          1, 2, …; 0: the control group, which continues openings of the domains' own texts
    sample         int64          its index within the iteration, 0, 1, …
    seed           int64          what it was drawn with
    text           string         without special tokens; may be empty
    token_ids      list<int32>    without the start token and the one that ended it
    tokens         int32          how many those are
    finish_reason  string         length, stop
    p_<domain>     double         one column per domain, in the configuration's order
    unclassified   double         the mass outside all domains; each row's probabilities sum to 1

The file's metadata say what it was made from, so a part of other inputs is never counted in. Its bytes are a function
of its content and those metadata alone.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vtmix import commit
from vtmix.artifacts import Inputs, compare
from vtmix.errors import ConflictError, DamageError, listing

METADATA_KEY = b"vtmix"
UNCLASSIFIED = "unclassified"
CONTROL = 0
"""The iteration that holds the control group."""

FinishReason = Literal["length", "stop"]


@dataclass(frozen=True)
class Sample:
    """One generated text. `token_ids` hold neither the start token nor the one that stopped it; both may be empty."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def sample_seed(seed: int, iteration: int, index: int) -> int:
    """The seed of one sample, 0 … 2^63-1: a hash, so that neighbouring indices share nothing."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def probability_columns(domains: Sequence[str]) -> list[str]:
    """The columns that hold a sample's probabilities: one per domain, then the mass outside them all."""
    return [*(f"p_{domain}" for domain in domains), UNCLASSIFIED]


def are_probabilities(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which rows (n, k + 1) are probabilities that sum to 1: (n,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        found: npt.NDArray[np.bool_] = (rows >= 0).all(axis=1) & np.isclose(rows.sum(axis=1), 1, rtol=0, atol=1e-9)
    return found


class Block(NamedTuple):
    """Samples that are generated, classified and committed together: [start, stop) of an iteration."""

    iteration: int
    part: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its part's place in the detection folder."""
        return f"iteration-{self.iteration:02d}/part-{self.part:05d}.parquet"


def blocks_of(iterations: int, samples: int, size: int) -> tuple[Block, ...]:
    """Every iteration's samples cut into blocks of `size`; the last of an iteration may be smaller.

    They come in rounds, a block of every iteration each: whoever stops early has drawn as much of every iteration.
    """
    return tuple(
        Block(iteration, part, start, min(start + size, samples))
        for part, start in enumerate(range(0, samples, size))
        for iteration in range(1, iterations + 1)
    )


def control_blocks(domains: int, texts: int, size: int) -> tuple[Block, ...]:
    """The control group's blocks, an iteration 0: sample i continues an opening of domain i // texts."""
    total = domains * texts
    return tuple(
        Block(CONTROL, part, start, min(start + size, total)) for part, start in enumerate(range(0, total, size))
    )


def schema_of(domains: Sequence[str]) -> pa.Schema:
    """The columns of a part."""
    return pa.schema(
        {
            "iteration": pa.int32(),
            "sample": pa.int64(),
            "seed": pa.int64(),
            "text": pa.string(),
            "token_ids": pa.list_(pa.int32()),
            "tokens": pa.int32(),
            "finish_reason": pa.string(),
            **dict.fromkeys(probability_columns(domains), pa.float64()),
        }
    )


@dataclass(frozen=True)
class Parts:
    """The parts a detection consists of, its control group's among them; `made_from` is what each says of itself."""

    folder: Path
    domains: tuple[str, ...]
    blocks: tuple[Block, ...]
    seed: int
    made_from: Inputs
    control: tuple[Block, ...] = ()

    @property
    def rounds(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks in rounds, one of every iteration each."""
        return tuple(tuple(found) for _, found in itertools.groupby(self.blocks, key=lambda block: block.part))

    def seeds(self, block: Block) -> list[int]:
        """The seeds of a block's samples, in order."""
        return [sample_seed(self.seed, block.iteration, index) for index in range(block.start, block.stop)]

    def encode(self, block: Block, samples: Sequence[Sample], judged: npt.NDArray[np.float64]) -> bytes:
        """The Parquet file of a block; `judged` holds the classifier's probabilities (n, k + 1)."""
        columns: dict[str, Any] = {
            "iteration": [block.iteration] * len(samples),
            "sample": range(block.start, block.stop),
            "seed": self.seeds(block),
            "text": [sample.text for sample in samples],
            "token_ids": [list(sample.token_ids) for sample in samples],
            "tokens": [len(sample.token_ids) for sample in samples],
            "finish_reason": [sample.finish_reason for sample in samples],
            **dict(zip(probability_columns(self.domains), judged.T, strict=True)),
        }
        schema = schema_of(self.domains)
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        table = pa.table(arrays, schema=schema.with_metadata({METADATA_KEY: json.dumps(self._identity(block))}))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def publish(self, block: Block, data: bytes) -> None:
        """Commits a block's part."""
        commit.publish_file(self.folder / block.name, data)

    def missing(self) -> list[Block]:
        """The blocks that are not committed yet; what a killed run left of them is removed.

        Raises DamageError naming every part that cannot be read, ConflictError every one that does not belong here.
        """
        for leftover in self.folder.glob("iteration-*/.part-*"):
            leftover.unlink()
        present = {str(path.relative_to(self.folder)) for path in self.folder.glob("iteration-*/*.parquet")}
        expected = {block.name: block for block in (*self.control, *self.blocks)}
        found = {name: _metadata(self.folder / name) for name in sorted(present)}
        _refuse_damage(self.folder, [f"{name}: not readable as Parquet" for name in found if found[name] is None])
        foreign = []
        for name, identity in found.items():
            if name not in expected:
                foreign.append(f"{name}: no such part belongs to this detection")
            elif changed := compare(identity or {}, self._identity(expected[name])):
                foreign.append(f"{name}: {', '.join(changed)}")
        if foreign:
            raise ConflictError(
                f"{self.folder} holds samples made from other inputs, which cannot be counted in:\n  "
                f"{listing(foreign)}\nrestore what changed, delete these files, or start another run folder"
            )
        return [block for name, block in expected.items() if name not in present]

    def decode(self, data: bytes) -> pl.DataFrame:
        """A part's samples: iteration, tokens and probabilities."""
        return pl.read_parquet(io.BytesIO(data), columns=["iteration", "tokens", *probability_columns(self.domains)])

    def read(self, blocks: Sequence[Block]) -> list[pl.DataFrame]:
        """Committed blocks' samples: iteration, tokens and probabilities.

        Raises DamageError naming every part that does not hold exactly its samples.
        """
        frames, damaged = [], []
        for block in blocks:
            try:
                frames.append(self._read(block))
            except (pa.ArrowException, OSError, ValueError) as error:
                damaged.append(f"{block.name}: {str(error).splitlines()[0]}")
        _refuse_damage(self.folder, damaged)
        return frames

    def _read(self, block: Block) -> pl.DataFrame:
        with pq.ParquetFile(self.folder / block.name, page_checksum_verification=True) as file:
            table = file.read()
        if not table.schema.equals(schema_of(self.domains)):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        frame = pl.DataFrame(pl.from_arrow(table))
        if frame["sample"].to_list() != list(range(block.start, block.stop)):
            raise ValueError(f"expected samples {block.start} to {block.stop - 1}, each once and in order")
        if frame["seed"].to_list() != self.seeds(block) or (frame["iteration"] != block.iteration).any():
            raise ValueError("its samples were drawn with other seeds")
        columns = probability_columns(self.domains)
        if not are_probabilities(frame.select(columns).to_numpy()).all():
            raise ValueError("probabilities do not sum to 1 in every row")
        return frame.select("iteration", "tokens", *columns)

    def _identity(self, block: Block) -> Inputs:
        return {**self.made_from, "iteration": block.iteration, "part": block.part}


def _metadata(path: Path) -> dict[str, Any] | None:
    """What a part says of itself; None when it is not a part."""
    try:
        found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _refuse_damage(folder: Path, lines: Sequence[str]) -> None:
    if lines:
        raise DamageError(
            f"{folder}: {len(lines)} parts do not hold what was committed:\n  {listing(lines)}\n"
            "delete them and run again: their samples are drawn again, the same"
        )
