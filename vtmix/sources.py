"""Sources → records: JSONL, Parquet and Hugging Face datasets, cut into parts that workers read on their own.

Where a source is cut changes neither its records nor the lines they are said to stand on.
"""

import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtmix.errors import RecordError, listing
from vtmix.records import BadRecord, Conversation, Invalid, conversation
from vtmix.settings import MixtureConfig, Source

PART_BYTES = 4 << 20
PART_ROWS = 4096
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A stretch [start, stop) of one source: bytes of a JSONL file, or rows of a table."""

    source: Source
    name: str
    path: str
    start: int
    stop: int
    size: int
    """Bytes of text, roughly: what it costs to read and encode."""
    lines_before: int = 0
    """Lines of a JSONL file that begin before the part."""


@dataclass(frozen=True)
class SourceParts:
    """The parts of one source and the digests of its files."""

    parts: tuple[Part, ...]
    digests: dict[str, str]


def open_source(source: Source, config: MixtureConfig) -> SourceParts:
    """The parts of a source, in order.

    Raises RecordError when the source names no file, files that are neither JSONL nor Parquet, or a table that cannot
    be opened.
    """
    if source.dataset is not None:
        return _open_dataset(source, source.dataset, config)
    parts: list[Part] = []
    digests = {}
    for path in _files(source, config):
        name = _name(path, source, config)
        found, digests[name] = (_parquet_parts if _is_parquet(path) else _jsonl_parts)(source, path, name)
        parts += found
    return SourceParts(tuple(parts), digests)


def read_part(part: Part) -> Iterator[tuple[str, Conversation] | BadRecord]:
    """The conversations of a part, each with where it stands; a record that cannot be used is a BadRecord."""
    is_table = part.source.dataset is not None or _is_parquet(Path(part.path))
    rows, parse = (_table_rows(part), _row) if is_table else (_lines(part), _parse)
    for number, raw in rows:
        where = f"{part.name}:{number}"
        try:
            turns = conversation(parse(raw), part.source)
        except Invalid as invalid:
            yield BadRecord(where, str(invalid))
        else:
            yield where, turns


def _files(source: Source, config: MixtureConfig) -> list[Path]:
    pattern = str(config.resolve(source.path or ""))
    if Path(pattern).is_dir():
        raise RecordError(
            f"{source.path}: is a folder: name its files ({source.path}/*.jsonl), or give it as `dataset`"
        )
    # A name that holds glob characters itself is taken literally.
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    paths = [Path(name) for name in names if Path(name).is_file()]
    if not paths:
        raise RecordError(f"{source.path}: no such file (looked for {pattern})")
    odd = [f"{path}: expected a name ending in .jsonl or .parquet" for path in paths if not _is_known(path)]
    if odd:
        raise RecordError(listing(odd))
    return paths


def _is_known(path: Path) -> bool:
    return path.suffix == ".jsonl" or _is_parquet(path)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _name(path: Path, source: Source, config: MixtureConfig) -> str:
    """A path as a person wrote it: relative to mixture.yaml, unless the source gives an absolute one."""
    absolute = Path(source.path or "").expanduser().is_absolute()
    return str(path) if absolute else os.path.relpath(path, config.root)


def _jsonl_parts(source: Source, path: Path, name: str) -> tuple[list[Part], str]:
    """The parts of a JSONL file and its digest, from reading it once."""
    parts = []
    digest = hashlib.sha256()
    start = newlines = 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(PART_BYTES):
            stop = start + len(block)
            begun = newlines + (last != b"\n")
            parts.append(Part(source, name, str(path), start, stop, len(block), begun))
            digest.update(block)
            start, newlines, last = stop, newlines + block.count(b"\n"), block[-1:]
    return parts, digest.hexdigest()


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within the part, numbered from 1 over the whole file; blank ones hold no record."""
    number = part.lines_before
    with open(part.path, "rb") as file:  # noqa: PTH123 (a part carries its path as text)
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the rest of the line that the part before began
        while file.tell() < part.stop and (line := file.readline()):
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    except json.JSONDecodeError as error:
        raise Invalid(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise Invalid("not usable JSON: nested too deeply") from None
    except ValueError:  # Python's limit on the digits it converts
        raise Invalid("not usable JSON: a number has too many digits") from None


def _not_utf8(error: UnicodeDecodeError) -> Invalid:
    return Invalid(f"text is not UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1})")


def _parquet_parts(source: Source, path: Path, name: str) -> tuple[list[Part], str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{name}: not readable as Parquet: {_one_line(error)}") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _table_parts(source, name, str(path), rows, path.stat().st_size), digest


def _table_parts(source: Source, name: str, path: str, rows: int, size: int) -> list[Part]:
    step = max(1, min(PART_ROWS, PART_BYTES * rows // max(size, 1)))
    return [
        Part(source, name, path, start, min(start + step, rows), size * min(step, rows - start) // rows)
        for start in range(0, rows, step)
    ]


def _table_rows(part: Part) -> Iterator[tuple[int, Any]]:
    """The rows of a part as Arrow scalars, numbered from 1 over the whole table."""
    batches = _parquet_batches(part) if part.source.dataset is None else _dataset_batches(part)
    return enumerate((row for batch in batches for row in batch.to_struct_array()), part.start + 1)


def _row(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None


def _columns(names: Iterable[str], source: Source) -> list[str]:
    """The columns to read: the source's fields, or all of them where these are missing and an error will name all."""
    found = [name for name in names if name in (source.prompt, source.response, source.messages)]
    complete = source.messages in found or {source.prompt, source.response} <= set(found)
    return found if complete else list(names)


def _parquet_batches(part: Part) -> Iterator[Any]:
    """The part's rows, decoding only the row groups that hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.path, pre_buffer=False) as file:
            ends = [0]
            for group in range(file.num_row_groups):
                ends.append(ends[-1] + file.metadata.row_group(group).num_rows)
            groups = [g for g in range(file.num_row_groups) if ends[g] < part.stop and ends[g + 1] > part.start]
            skip, left = part.start - ends[groups[0]], part.stop - part.start
            columns = _columns(file.schema_arrow.names, part.source)
            for batch in file.iter_batches(PART_ROWS, row_groups=groups, columns=columns):
                wanted = batch.slice(skip, left)
                skip, left = max(0, skip - len(batch)), left - len(wanted)
                yield wanted
                if not left:
                    return
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{part.name}: not readable as Parquet: {_one_line(error)}") from None


def _open_dataset(source: Source, dataset: str, config: MixtureConfig) -> SourceParts:
    folder = config.resolve(dataset)
    path = str(folder) if folder.is_dir() else dataset
    _load_dataset.cache_clear()  # what stands there now counts
    loaded = _load_dataset(source, path)
    name = f"{dataset}/{source.config}[{source.split}]" if source.config else f"{dataset}[{source.split}]"
    parts = _table_parts(source, name, path, len(loaded), loaded.data.nbytes)
    return SourceParts(tuple(parts), {name: _dataset_digest(loaded, source)})


@functools.lru_cache(maxsize=4)
def _load_dataset(source: Source, path: str) -> Any:
    """A split of a Hugging Face dataset: one saved to disk, a folder of files, or one on the hub."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _split(datasets.load_from_disk(path), source.split)
        return datasets.load_dataset(path, source.config, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RecordError(f"dataset {path!r} (split {source.split!r}) cannot be loaded: {_one_line(error)}") from None


def _split(saved: Any, name: str) -> Any:
    """A split of a dataset saved to disk; one that was saved without splits is taken for `train`."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if name not in splits:
        raise ValueError(f"it holds the splits {', '.join(map(repr, splits))}")
    return splits[name]


def _dataset_batches(part: Part) -> Iterator[Any]:
    yield _as_arrow(_load_dataset(part.source, part.path), part.source)[part.start : part.stop]


def _as_arrow(dataset: Any, source: Source) -> Any:
    """The dataset as Arrow tables of the fields that count: nothing else, such as images, is decoded."""
    return dataset.select_columns(_columns(dataset.column_names, source)).with_format("arrow")


def _dataset_digest(dataset: Any, source: Source) -> str:
    """SHA-256 over the rows' fields that count, so that one dataset has one digest wherever it is cached."""
    digest = hashlib.sha256()
    for table in _as_arrow(dataset, source).iter(PART_ROWS):
        for scalar in table.to_struct_array():
            try:
                row = _row(scalar)
            except Invalid as invalid:
                row = str(invalid)
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
