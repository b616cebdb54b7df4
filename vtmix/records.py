"""Source records → conversations: JSONL, Parquet and Hugging Face datasets.

A source is cut into parts that workers read on their own. A record that cannot be used is reported with its file and
line (or row), never dropped in silence.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtmix.config import MixtureConfig, Source
from vtmix.errors import RecordError, listing

PART_BYTES = 4 << 20
PART_ROWS = 4096
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


class BadRecord(NamedTuple):
    """A record that cannot be used: where it stands, and why."""

    where: str
    why: str


class Invalid(ValueError):
    """Says why a record cannot be used."""


@dataclass(frozen=True)
class Part:
    """A stretch of one source: bytes of a JSONL file, or rows of a table."""

    source: Source
    name: str
    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class SourceParts:
    """The parts of one source and the digests of its files."""

    parts: tuple[Part, ...]
    digests: dict[str, str]


def open_source(source: Source, config: MixtureConfig) -> SourceParts:
    """The parts of a source, in order.

    Raises RecordError when the source names no file, or files that are neither JSONL nor Parquet.
    """
    if source.dataset is not None:
        return _open_dataset(source, config)
    paths = _files(source, config)
    parts = [part for path in paths for part in _file_parts(source, path, _name(path, config))]
    return SourceParts(tuple(parts), {_name(path, config): _digest(path) for path in paths})


def read_part(part: Part) -> Iterator[tuple[str, Conversation] | BadRecord]:
    """The conversations of a part, each with where it stands; a record that cannot be used is a BadRecord."""
    rows = _read_lines(part) if part.path.endswith(".jsonl") else _read_rows(part)
    for where, row in rows:
        try:
            yield where, conversation(row() if callable(row) else row, part.source)
        except Invalid as invalid:
            yield BadRecord(where, str(invalid))


def conversation(row: Any, source: Source) -> Conversation:
    """The conversation a record holds: its `messages` field, or else its prompt and response fields.

    Raises Invalid saying what was found and what was expected.
    """
    if not isinstance(row, Mapping):
        raise Invalid(f"expected an object with fields, found {_kind(row)}")
    if row.get(source.messages) is not None:
        return _chat(row[source.messages], source.messages)
    missing = [field for field in (source.prompt, source.response) if row.get(field) is None]
    if missing:
        fields = ", ".join(map(repr, row)) or "none"
        raise Invalid(
            f"no field {' and '.join(map(repr, missing))} (nor {source.messages!r}): found {fields}; "
            "name the fields in the source's settings"
        )
    return Turn("user", _text(row, source.prompt)), Turn("assistant", _text(row, source.response))


def sample_id(turns: Conversation) -> str:
    """32 hex digits derived from a conversation's content alone: equal content is an exact duplicate."""
    data = json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_of(turns: Conversation) -> str:
    """What a conversation says, without its roles."""
    return "\n".join(turn.content for turn in turns if turn.role != "system")


def _chat(messages: Any, field: str) -> Conversation:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise Invalid(f"{field!r} is {_kind(messages)}, expected a list of {{role, content}}")
    turns = tuple(_turn(message, f"{field}[{number}]") for number, message in enumerate(messages))
    if not any(turn.role == "assistant" for turn in turns):
        raise Invalid(f"{field!r} has no assistant turn, so there is nothing to learn from")
    return turns


def _turn(message: Any, field: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise Invalid(f"{field} is {_kind(message)}, expected {{role, content}}")
    if message["role"] not in ROLES:
        raise Invalid(f"{field} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
    return Turn(message["role"], _text(message, "content", field))


def _text(row: Mapping[str, Any], field: str, where: str = "") -> str:
    name, value = f"{where}.{field}" if where else field, row[field]
    if not isinstance(value, str):
        raise Invalid(f"{name!r} is {_kind(value)}, expected text")
    if not value.strip():
        raise Invalid(f"{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"{name!r} holds a lone surrogate at character {error.start}, which UTF-8 cannot carry") from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")


def _files(source: Source, config: MixtureConfig) -> list[Path]:
    pattern = str(config.resolve(source.path or ""))
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (the pattern is absolute)
    paths = [Path(name) for name in found if Path(name).is_file()]
    if Path(pattern).is_file():
        paths = [Path(pattern)]
    if not paths:
        raise RecordError(f"{source.path}: no such file (looked for {pattern})")
    odd = [f"{path}: expected a name ending in .jsonl or .parquet" for path in paths if not _is_known(path)]
    if odd:
        raise RecordError(listing(odd))
    return paths


def _is_known(path: Path) -> bool:
    return path.suffix in (".jsonl", ".parquet")


def _name(path: Path, config: MixtureConfig) -> str:
    """A path as a person wrote it: relative to mixture.yaml where it lies below it."""
    return str(path.relative_to(config.root)) if path.is_relative_to(config.root) else str(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_parts(source: Source, path: Path, name: str) -> Iterator[Part]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        total, step = pq.read_metadata(path).num_rows, PART_ROWS
    else:
        total, step = path.stat().st_size, PART_BYTES
    for start in range(0, total, step):
        yield Part(source, name, str(path), start, min(start + step, total))


def _read_lines(part: Part) -> Iterator[tuple[str, Any]]:
    """Lines that begin within the part's bytes, each with a function that parses it."""
    with open(part.path, "rb") as file:  # noqa: PTH123 (a part carries its path as text)
        number = _lines_before(part)
        file.seek(max(part.start - 1, 0))
        if part.start > 0:
            file.readline()  # the line that the part before began
        while file.tell() < part.stop and (line := file.readline()):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{part.name}:{number}", lambda line=line: _parse(line)


def _lines_before(part: Part) -> int:
    """How many lines begin before the part."""
    if part.start == 0:
        return 0
    found, last = 0, b""
    with open(part.path, "rb") as file:  # noqa: PTH123
        left = part.start
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            found, last, left = found + block.count(b"\n"), block[-1:], left - len(block)
    return found + (last != b"\n")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise Invalid(f"text is not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise Invalid("not usable JSON: nested too deeply") from None


def _read_rows(part: Part) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_rows(part), part.start + 1):
        yield f"{part.name}:{number}", row


def _rows(part: Part) -> Iterator[Any]:
    if part.path.endswith(".parquet"):
        import pyarrow.dataset as ds

        table = ds.dataset(part.path).scanner().take(list(range(part.start, part.stop)))
        yield from table.to_pylist()
    else:
        yield from _load_dataset(part.source, part.path).select(range(part.start, part.stop))


def _open_dataset(source: Source, config: MixtureConfig) -> SourceParts:
    name = source.dataset or ""
    folder = config.resolve(name)
    path = str(folder) if folder.is_dir() else name
    dataset = _load_dataset(source, path)
    parts = tuple(
        Part(source, name, path, start, min(start + PART_ROWS, len(dataset)))
        for start in range(0, len(dataset), PART_ROWS)
    )
    return SourceParts(parts, {name: _dataset_digest(dataset)})


def _load_dataset(source: Source, path: str) -> Any:
    """A split of a Hugging Face dataset: one saved to disk, a folder of files, or one on the hub."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(path, source.config, split=source.split)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"dataset {path!r} (split {source.split!r}) cannot be loaded: {reason}") from None


def _dataset_digest(dataset: Any) -> str:
    """SHA-256 over the rows, so that one dataset has one digest wherever it is cached."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()
