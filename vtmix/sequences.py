"""From a shard's encoded samples to packed sequences; token ids are cut out of the samples' bytes.

What is done per sample is done for the whole shard at once; Python is spent per sequence.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vtmix import mds
from vtmix.errors import MixtureError
from vtmix.mds import IGNORED, Integers
from vtmix.packing import pack, spread
from vtmix.pool import gather
from vtmix.settings import Packing


def packed(
    data: memoryview,
    edges: Integers,
    domains: npt.NDArray[np.int32],
    names: Sequence[str],
    sample_ids: Sequence[str],
    packing: Packing,
    seed: tuple[int, int],
) -> Iterator[bytes]:
    """The sequences that a shard's samples share, as MDS samples of PACKED_COLUMNS in the order of training.

    `data` are the shard's samples one after the other, `edges` where each begins and the last one ends; `domains`
    index `names`. Samples keep their order within a sequence. Raises MixtureError when one is longer than a sequence.
    """
    tokens, ids, labels = mds.token_spans(np.frombuffer(data, np.uint8), edges)
    _require_fitting(tokens, domains, names, packing.length)
    rows, count = places(tokens, domains, len(names), packing, seed)
    members = np.argsort(rows, kind="stable")
    matrix = _Rows(tokens[members], rows[members], count, packing.length)
    # Padding is a member of its own, which no other sees, and carries no label: any id would do.
    all_ids = matrix.filled(_cut(data, ids, tokens, members), 0)
    all_labels = matrix.filled(_cut(data, labels, tokens, members), IGNORED)
    all_labels[matrix.begins] = IGNORED  # A member's first token would be predicted from the member before.
    positions = matrix.positions()
    belong, identities = np.array(names, object)[domains[members]], np.array(sample_ids, object)[members]
    for row, (start, stop) in enumerate(pairwise(matrix.edges.tolist())):
        sample = mds.PackedSample(
            domains=",".join(belong[start:stop]),
            input_ids=all_ids[row],
            labels=all_labels[row],
            # MDS has no empty arrays: an empty sequence has one member, of no tokens and no name.
            lengths=tokens[members[start:stop]].astype(np.int32) if stop > start else np.zeros(1, np.int32),
            position_ids=positions[row],
            sample_ids=",".join(identities[start:stop]),
        )
        yield mds.encode_sample(sample, mds.PACKED_COLUMNS)


def _require_fitting(tokens: Integers, domains: npt.NDArray[np.int32], names: Sequence[str], length: int) -> None:
    at = int(tokens.argmax())
    if tokens[at] > length:
        raise MixtureError(
            f"the pool of '{names[domains[at]]}' holds a sample of {tokens[at]:,} tokens, more than "
            f"mixture.packing.length ({length:,}): raise it, or build the pool with a lower encoding.max_length"
        )


def places(
    tokens: Integers, domains: npt.NDArray[np.int32], kinds: int, packing: Packing, seed: tuple[int, int]
) -> tuple[Integers, int]:
    """Where in the order of training each sample's sequence stands, and how many sequences there are."""
    sequences = pack(tokens, packing.length)
    count = -(-(int(sequences.max()) + 1) // packing.multiple) * packing.multiple
    samples = np.bincount(sequences * kinds + domains, minlength=count * kinds).reshape(count, kinds)
    place = np.empty(count, np.int64)
    place[spread(samples, seed)] = np.arange(count)
    return place[sequences], count


class _Rows:
    """The layout of sequences as rows of a matrix, given their members' tokens, and the row of each, in order."""

    def __init__(self, tokens: Integers, places: Integers, count: int, length: int) -> None:
        self.edges = np.searchsorted(places, np.arange(count + 1))
        before = np.concatenate([[0], np.cumsum(tokens)])
        taken = np.diff(before[self.edges])
        self._columns = np.arange(length, dtype=np.int32)
        self._inside = self._columns < taken[:, None]
        self.begins = np.zeros((count, length), bool)
        """Where a member begins, or the padding."""
        self.begins[places, before[:-1] - before[self.edges[places]]] = True
        padded = np.flatnonzero(taken < length)
        self.begins[padded, taken[padded]] = True

    def filled(self, values: npt.NDArray[np.int32], padding: int) -> npt.NDArray[np.int32]:
        """The members' values row after row, each row padded at its end."""
        rows = np.full(self.begins.shape, padding, np.int32)
        rows[self._inside] = values
        return rows

    def positions(self) -> npt.NDArray[np.int32]:
        """Counted from 0 within each member, and within the padding."""
        begun: npt.NDArray[np.int32] = np.maximum.accumulate(np.where(self.begins, self._columns, 0), axis=1)
        return self._columns - begun


def _cut(data: memoryview, starts: Integers, tokens: Integers, members: Integers) -> npt.NDArray[np.int32]:
    """The arrays of so many tokens that begin at `starts`, in the order of the members."""
    # To Arrow, what lies between two arrays is an element as well.
    edges = np.stack([starts, starts + 4 * tokens], axis=1).ravel()
    buffers = [None, pa.py_buffer(edges), pa.py_buffer(data)]
    pieces = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(edges) - 1, buffers)
    return np.frombuffer(gather(pieces, 2 * members), np.int32)
