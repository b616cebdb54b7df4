"""The MDS shard and index layout (MosaicML Streaming, format version 2), vectorised over samples.

A shard is  u32 samples | u32 offset × (samples + 1) | JSON header | sample bytes …,  offsets counted from the start of
the file. A sample is  u32 size × variable-size columns | column bytes …,  columns in alphabetical order. Since sample
bytes do not depend on their shard, they are encoded once, and writing a shard is concatenation.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from vtmix.errors import DamageError, MissingError, MixtureError
from vtmix.settings import Packing

COLUMNS: Mapping[str, str] = {
    "domain": "str",
    "input_ids": "ndarray:int32",
    "labels": "ndarray:int32",
    "sample_id": "str",
}
PACKED_COLUMNS: Mapping[str, str] = {
    "domains": "str",
    "input_ids": "ndarray:int32",
    "labels": "ndarray:int32",
    "lengths": "ndarray:int32",
    "position_ids": "ndarray:int32",
    "sample_ids": "str",
}
INDEX = "index.json"
IGNORED = -100
"""The label of a token that no loss is taken of."""
DEFAULT_LEVEL = 3

IntArray = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]


class Sample(TypedDict):
    """One encoded conversation: token ids and labels of equal length, labels IGNORED where no loss is taken."""

    domain: str
    input_ids: IntArray
    labels: IntArray
    sample_id: str


class PackedSample(TypedDict):
    """Several samples as one sequence of fixed length, padded at its end.

    `lengths` are the tokens of its members, in order; `domains` and `sample_ids` name them, separated by commas.
    `position_ids` count from 0 within each member, and within the padding. An empty sequence has one member, of no
    tokens and no name.
    """

    domains: str
    input_ids: IntArray
    labels: IntArray
    lengths: IntArray
    position_ids: IntArray
    sample_ids: str


def shard_name(number: int) -> str:
    """The file name of a shard that is not compressed: MDSWriter's."""
    return f"shard.{number:05d}.mds"


def shard_number(name: str) -> int:
    """The number a shard's name gives. From 100,000 on, names in alphabetical order are not in order."""
    return int(name.split(".")[1])


def encode_sample(sample: Sample | PackedSample, columns: Mapping[str, str] = COLUMNS) -> bytes:
    """The bytes MDSWriter stores for a sample of these columns."""
    values: Mapping[str, Any] = sample
    encoded = [_CODECS[encoding][0](values[name]) for name, encoding in columns.items()]
    return np.array([len(column) for column in encoded], np.uint32).tobytes() + b"".join(encoded)


def decode_sample(data: bytes | memoryview, columns: Mapping[str, str] = COLUMNS) -> Any:
    """The sample of these columns that encode_sample made `data` from; the arrays are copies.

    Raises DamageError when the sizes do not add up, or a column does not hold what its encoding says.
    """
    heading = 4 * len(columns)
    if len(data) < heading:
        raise DamageError(f"a sample of {len(data)} bytes is shorter than its own heading of {heading}")
    sizes = np.frombuffer(data[:heading], np.uint32).tolist()
    ends = list(itertools.accumulate(sizes, initial=heading))
    if ends[-1] != len(data):
        raise DamageError(f"a sample of {len(data):,} bytes declares columns of {sizes} bytes")
    try:
        return {
            name: _CODECS[encoding][1](bytes(data[begin:end]))
            for (name, encoding), (begin, end) in zip(columns.items(), itertools.pairwise(ends), strict=True)
        }
    except UnicodeDecodeError as error:
        raise DamageError(f"a sample holds text that is not UTF-8 (byte {error.start})") from None


def sequence_bytes(length: int) -> int:
    """The bytes of a packed sample, at most, beside those of its members: their lengths, ids, domains and commas."""
    return 4 * len(PACKED_COLUMNS) + 4 * 5 + 4 + 3 * 4 * length


def token_spans(data: npt.NDArray[np.uint8], edges: Integers) -> tuple[Integers, Integers, Integers]:
    """Of samples that encode_sample made and that stand one after the other: their tokens, and where the values of
    their input_ids and of their labels begin.

    `edges` are the places in `data` where the samples begin, and where the last one ends. Raises DamageError when the
    sizes do not add up.
    """
    begins, heading = edges[:-1], 4 * len(COLUMNS)
    if (np.diff(edges) < heading).any():
        raise DamageError("an encoded sample is shorter than its own heading: build the pools again")
    sizes = data[begins[:, None] + np.arange(heading)].view(np.uint32).astype(np.int64)
    ends = begins[:, None] + heading + np.cumsum(sizes, axis=1)
    _, ids, labels, _ = sizes.T
    if (ends[:, -1] != edges[1:]).any() or (ids != labels).any():
        raise DamageError("an encoded sample declares columns that it does not hold: build the pools again")
    # Before its values an array has 2, 3 or 5 bytes: 2, and less than a value more.
    tokens = (ids - 2) // 4
    return tokens, ends[:, 1] - 4 * tokens, ends[:, 2] - 4 * tokens


def _encode_array(values: IntArray) -> bytes:
    """A one-dimensional array: a byte (dimensions << 2 | width code), the length in that width, the values."""
    length = len(values)
    code = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return bytes([1 << 2 | code]) + length.to_bytes(1 << code, "little") + values.astype(np.int32, copy=False).tobytes()


def _decode_array(data: bytes) -> IntArray:
    start = 1 + (1 << (data[0] & 3)) if data else 1
    length = int.from_bytes(data[1:start], "little")
    if not data or data[0] >> 2 != 1 or len(data) != start + 4 * length:
        raise DamageError(f"an array of {len(data):,} bytes does not hold the {length:,} numbers it declares")
    return np.frombuffer(data, np.int32, offset=start).copy()


_CODECS: Mapping[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "str": (str.encode, bytes.decode),
    "ndarray:int32": (_encode_array, _decode_array),
}
"""All that a column may hold. MosaicML knows more encodings, one of which is pickle."""


@dataclass(frozen=True)
class ShardSize:
    """What index.json says of one shard: its samples, its bytes, and those of its compressed file, if it has one."""

    samples: int
    bytes: int
    compressed: int | None = None


@dataclass(frozen=True)
class Layout:
    """What the shards of one folder have in common.

    `size_limit` bounds a shard's bytes before compression, `compression` is in MDSWriter's words (zstd, zstd:3),
    `packing` says how samples share sequences (None: each is stored by itself).
    """

    size_limit: int
    compression: str | None = None
    packing: Packing | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """Names and encodings of what a sample holds."""
        return PACKED_COLUMNS if self.packing else COLUMNS

    def name(self, number: int) -> str:
        """The name of a shard's file as it is stored: compressed, if it is."""
        name = shard_name(number)
        return f"{name}.{self.compression.partition(':')[0]}" if self.compression else name

    @property
    def _settings(self) -> dict[str, Any]:
        """What a shard's header and its index entry say alike."""
        return {
            "column_encodings": list(self.columns.values()),
            "column_names": list(self.columns),
            "column_sizes": [None] * len(self.columns),
            "compression": self.compression,
            "format": "mds",
            "hashes": [],
            "size_limit": self.size_limit,
            "version": 2,
        }

    def compress(self, data: bytes | memoryview) -> memoryview:
        """One frame that says how long its content is, which MosaicML's reader needs."""
        return memoryview(self._codec.compress(data))

    def expand(self, data: bytes, size: int) -> bytes:
        """What `compress` was given.

        Raises ValueError unless `data` is the frame of `size` bytes.
        """
        try:
            content: bytes = self._codec.decompress(data, size, asbytes=True)
        except OSError as error:
            raise ValueError(str(error)) from None
        return content

    @property
    def _codec(self) -> Any:
        import pyarrow as pa

        name, _, level = str(self.compression).partition(":")
        return pa.Codec(name, compression_level=int(level or DEFAULT_LEVEL))

    def header(self, lengths: npt.NDArray[np.int64]) -> bytes:
        """Everything that stands before the first sample, given the samples' lengths in bytes.

        Raises MixtureError when the shard would reach 4 GiB, which its uint32 offsets cannot address.
        """
        settings = json.dumps(self._settings, sort_keys=True).encode()
        first = 4 + 4 * (len(lengths) + 1) + len(settings)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) + first
        if offsets[-1] >= 1 << 32:
            raise MixtureError(
                f"a shard of {offsets[-1]:,} bytes exceeds the 4 GiB its offsets can address: lower mixture.shard_bytes"
            )
        return np.uint32(len(lengths)).tobytes() + offsets.astype(np.uint32).tobytes() + settings

    def header_bytes(self, samples: int) -> int:
        """The length of `header` for so many samples."""
        return 4 + 4 * (samples + 1) + len(json.dumps(self._settings, sort_keys=True))

    def index(self, shards: Sequence[ShardSize]) -> bytes:
        """The content of index.json."""
        entries = [
            {
                **self._settings,
                "raw_data": {"basename": shard_name(number), "bytes": shard.bytes, "hashes": {}},
                "samples": shard.samples,
                "zip_data": None
                if shard.compressed is None
                else {"basename": self.name(number), "bytes": shard.compressed, "hashes": {}},
            }
            for number, shard in enumerate(shards)
        ]
        return json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()


class Samples(Sequence[Any]):
    """Random access to the samples of a folder that vtmix wrote, without caches or shared memory: each a Sample, or
    in a packed mixture a PackedSample.
    """

    def __init__(self, folder: Path) -> None:
        """Raises MissingError when the folder holds no index.json, DamageError when it is not one of vtmix."""
        try:
            entries = json.loads((folder / INDEX).read_bytes())["shards"]
            self._ends = np.cumsum([entry["samples"] for entry in entries], dtype=np.int64)
            self._sizes = [entry["raw_data"]["bytes"] for entry in entries]
            packed = any(entry["column_names"] == list(PACKED_COLUMNS) for entry in entries)
        except FileNotFoundError:
            raise MissingError(f"{folder}: holds no {INDEX}, so it is not a complete MDS folder") from None
        except (ValueError, TypeError, KeyError):
            raise DamageError(f"{folder / INDEX}: is not an index that vtmix writes") from None
        self._columns = PACKED_COLUMNS if packed else COLUMNS
        self._files = [folder / shard_name(number) for number in range(len(entries))]
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        return decode_sample(self.raw(position % len(self)), self._columns)

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def raw(self, position: int) -> bytes:
        """The bytes of one sample.

        Raises DamageError when its shard is missing, or not as large as index.json says.
        """
        shard = int(np.searchsorted(self._ends, position, side="right"))
        local = position - (int(self._ends[shard - 1]) if shard else 0)
        data = self._maps.get(shard)
        if data is None:
            data = self._maps[shard] = self._open(shard)
        begin, end = data[4 + 4 * local : 12 + 4 * local].view(np.uint32).tolist()
        return data[begin:end].tobytes()

    def _open(self, shard: int) -> npt.NDArray[np.uint8]:
        path, expected = self._files[shard], self._sizes[shard]
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise DamageError(f"{path}: {found}, {INDEX} says {expected:,} bytes")
        return np.memmap(path, np.uint8, "r")
