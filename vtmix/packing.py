"""Which samples share a sequence, and in which order sequences stand: pure arithmetic on lengths and counts.

Packing is best fit decreasing (Johnson et al., SIAM J. Comput. 3, 1974): longest sample first, each into the sequence
with the least room that still holds it. All sequences but one are more than half full, and fuller than their length
minus the longest sample (`fullness`).
"""

from bisect import bisect_left, insort

import numpy as np

from vtmix.mds import Integers

WAITING = 512
"""Sequences among which the next one is chosen: the work per sequence is the same however many there are."""
TAKEN = 1 << 62
"""Farther than any sequence can be."""


def pack(lengths: Integers, capacity: int) -> Integers:
    """The number of the sequence that each sample goes to, counted from 0 without gaps: shape (samples,).

    No sequence holds more than `capacity` tokens, which no sample may exceed. Ties go by the samples' order.
    """
    order = np.argsort(-lengths, kind="stable")
    sequences = []
    rooms: list[int] = []  # tokens of room, in order, each once
    holders: dict[int, list[int]] = {}  # the sequences with that room
    opened = 0
    for length in lengths[order].tolist():
        fit = bisect_left(rooms, length)
        if fit < len(rooms):
            room = rooms[fit]
            sequence = holders[room].pop()
            if not holders[room]:
                del rooms[fit]
        else:
            room, sequence, opened = capacity, opened, opened + 1
        sequences.append(sequence)
        if left := room - length:
            waiting = holders.setdefault(left, [])
            if not waiting:
                insort(rooms, left)
            waiting.append(sequence)
    found = np.empty(len(lengths), np.int64)
    found[order] = sequences
    return found


def fullness(capacity: int, longest: int) -> float:
    """Tokens that every sequence but one holds more than, whatever is packed, none longer than `longest`.

    A sequence was opened since its first sample fitted into none before it: those had less room than that.
    """
    return max(capacity - longest, capacity / 2)


def spread(counts: Integers, seed: tuple[int, int]) -> Integers:
    """An order of sequences in which every stretch of them holds about its share of every domain's samples.

    `counts` are samples per sequence and domain, shape (sequences, domains). Of a few sequences that wait, in an order
    drawn from the seed, the next is the one after which the sums so far are nearest to their shares (herding: Welling,
    ICML 2009). Sums in integers, so that they are the same on every machine.
    """
    total = len(counts)
    drawn = np.argsort(np.random.Philox(key=np.array(seed, np.uint64)).random_raw(total), kind="stable")
    # Each sequence's distance from the mean one, times their number.
    steps = (counts * total - counts.sum(axis=0))[drawn]
    squares = (steps**2).sum(axis=1)
    waiting = np.arange(min(WAITING, total))
    near, sizes = steps[waiting], squares[waiting]
    off = np.zeros(counts.shape[1], np.int64)
    order = np.empty(total, np.int64)
    for place in range(total):
        # |off + step|² without |off|², which is the same for all.
        chosen = int((near @ (2 * off) + sizes).argmin())
        order[place] = waiting[chosen]
        off += near[chosen]
        upcoming = place + WAITING
        if upcoming < total:
            waiting[chosen], near[chosen], sizes[chosen] = upcoming, steps[upcoming], squares[upcoming]
        else:
            sizes[chosen] = TAKEN
    return drawn[order]
