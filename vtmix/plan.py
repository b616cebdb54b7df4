"""Weights → counts → which sample stands where: pure arithmetic on a few numbers, whatever the size of the epoch.

Counts are a largest remainder. Each domain keeps a position in the endless repetition of its pool, which carries over
epochs, so no sample repeats before its whole pool was seen. The order within an epoch is an `Arrangement`: a function
from positions to domains, computable anywhere in the epoch without walking there.
"""

import hashlib
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vtmix import mds
from vtmix.artifacts import DomainPlan, Inputs, Plan, PoolManifest, Weights
from vtmix.errors import MixtureError, listing
from vtmix.packing import fullness
from vtmix.settings import Packing

WINDOW = 128
"""The window in which every domain's count is held near its share: the paper's batch."""
CANDIDATES = 64
CONFIDENCE = 20
"""A shard exceeds its cap with a chance of at most e^-20."""


def apportion(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Integer counts by largest remainder: they sum to `samples`, each within 1 of its exact share.

    Ties go by name, so that the order of the domains never matters; weight 0 gives 0. Exact for any size, since
    the shares are fractions.
    """
    total = sum(map(Fraction, weights.values()), Fraction(0))
    shares = {name: Fraction(weight) * samples / total for name, weight in weights.items()}
    counts = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(weights, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: samples - sum(counts.values())]:
        counts[name] += 1
    return counts


def make_plan(
    weights: Weights,
    pools: Mapping[str, PoolManifest],
    *,
    samples: int,
    seed: int,
    shard_bytes: int,
    packing: Packing | None = None,
    max_passes: float | None = None,
    previous: Plan | None = None,
) -> Plan:
    """The plan of an epoch of `samples` samples.

    `previous` is the plan of the epoch before; without one, each domain starts at a position drawn from the seed.
    Of `packing` nothing but the number of shards follows.

    Raises MixtureError listing every domain whose pool cannot serve its weight.
    """
    layout = mds.Layout(shard_bytes, packing=packing)
    counts = _checked_counts(weights, pools, samples, layout, max_passes)
    domains = {
        name: DomainPlan(
            weight=weights.weights[name],
            count=count,
            position=_position(name, pools[name], seed, previous),
            pool_samples=pools[name].samples,
            pool=pools[name].fingerprint(),
            passes=count / pools[name].samples if pools[name].samples else 0.0,
            unique=min(count, pools[name].samples),
        )
        for name, count in counts.items()
    }
    return Plan(
        inputs=plan_inputs(weights, pools, samples=samples, seed=seed, layout=layout, previous=previous),
        epoch=weights.epoch,
        knowledge=weights.knowledge,
        samples=samples,
        shards=_shards(counts, pools, layout),
        seed=seed,
        domains=domains,
    )


def plan_inputs(
    weights: Weights,
    pools: Mapping[str, PoolManifest],
    *,
    samples: int,
    seed: int,
    layout: mds.Layout,
    previous: Plan | None,
) -> Inputs:
    """What a plan is made from."""
    return {
        "samples": samples,
        "seed": seed,
        "shard_bytes": layout.size_limit,
        "packing": layout.packing and layout.packing.model_dump(),
        "weights": dict(weights.weights),
        "pools": {name: pools[name].fingerprint() for name in weights.weights if name in pools},
        "previous_plan": previous.fingerprint() if previous else None,
    }


def _checked_counts(
    weights: Weights,
    pools: Mapping[str, PoolManifest],
    samples: int,
    layout: mds.Layout,
    max_passes: float | None,
) -> dict[str, int]:
    unknown = [f"domain '{name}' has a weight but no pool: build its pool" for name in weights.weights.keys() - pools]
    unknown += [f"domain '{name}' has a pool but no weight: give it one" for name in pools.keys() - weights.weights]
    if unknown:
        raise MixtureError(listing(sorted(unknown)))
    counts = apportion(weights.weights, samples)
    offenders = []
    for name, count in counts.items():
        pool, weight = pools[name], weights.weights[name]
        if count and not pool.samples:
            offenders.append(
                f"domain '{name}' has weight {weight:.4g} but its pool is empty: add samples, or set its weight to 0"
            )
        elif max_passes is not None and count > max_passes * pool.samples:
            offenders.append(
                f"domain '{name}' needs {count:,} samples, {count / pool.samples:.2f} passes over its pool of "
                f"{pool.samples:,}, but mixture.max_passes is {max_passes:g}: add samples, or raise it"
            )
        elif count and (most := _Bytes.of([(pool, 1)], layout).most(1)) > layout.size_limit:
            takes = f"{pool.max_sample_bytes:,} bytes" + (f", and packed as many as {most:,}" if layout.packing else "")
            offenders.append(
                f"the largest sample of '{name}' takes {takes}, more than mixture.shard_bytes "
                f"({layout.size_limit:,}) can hold: raise it"
            )
    if offenders:
        raise MixtureError(listing(offenders))
    return counts


def _position(name: str, pool: PoolManifest, seed: int, previous: Plan | None) -> int:
    if previous is None:
        return _draw(pool.samples, seed, "start", name) if pool.samples else 0
    before = previous.domains.get(name)
    if before is None or before.pool != pool.fingerprint():
        raise MixtureError(
            f"the pool of '{name}' is not the one epoch {previous.epoch} drew from, so its position is unknown: "
            "restore that pool, or start another run folder"
        )
    return before.position + before.count


@dataclass(frozen=True)
class _Bytes:
    """What a shard takes: `fixed` bytes, and those of every sample, on average and at most."""

    fixed: int
    mean: float
    largest: float

    @classmethod
    def of(cls, used: Sequence[tuple[PoolManifest, int]], layout: mds.Layout) -> "_Bytes":
        """Of samples drawn from pools, so many from each.

        A packed sample takes its share of a sequence as if those were no fuller than they are for certain, and its id
        and domain: no more than what was stored beside its tokens' 8 bytes each. One sequence is less full.
        """
        samples = sum(count for _, count in used)
        largest = max(pool.max_sample_bytes for pool, _ in used)
        mean = sum(count * pool.bytes / pool.samples for pool, count in used) / samples
        if layout.packing is None:
            return cls(layout.header_bytes(0), 4 + mean, 4 + largest)
        length, sequence = layout.packing.length, mds.sequence_bytes(layout.packing.length) + 4
        longest = min(length, largest // 8)
        token = sequence / fullness(length, longest)
        tokens = sum(count * pool.tokens / pool.samples for pool, count in used) / samples
        fixed = layout.header_bytes(0) + layout.packing.multiple * sequence
        return cls(fixed, mean + (token - 8) * tokens, largest + (token - 8) * longest)

    def most(self, samples: int) -> int:
        """The bytes that so many samples never exceed."""
        return self.fixed + math.ceil(samples * self.largest)


def _shards(counts: Mapping[str, int], pools: Mapping[str, PoolManifest], layout: mds.Layout) -> int:
    """Shards needed so that none exceeds the cap, whichever samples fall into it.

    A shard of m samples of mean μ and at most L bytes stays below mμ + cL/3 + √((cL/3)² + 2cmμL) but for a chance of
    e^-c (Bernstein's inequality, the variance being at most μL); one of few samples below mL for certain.
    """
    samples = sum(counts.values())
    takes = _Bytes.of([(pools[name], count) for name, count in counts.items() if count], layout)
    room = layout.size_limit - takes.fixed
    # Bernstein's bound equals the room where (room - mμ)² = (room - mμ)·2cL/3 + 2cmμL; as u = room - mμ this is
    # u² + (4/3)cLu - 2cL·room = 0, of which u is the positive root.
    slack = CONFIDENCE * takes.largest
    spare = math.sqrt((2 * slack / 3) ** 2 + 2 * slack * room) - 2 * slack / 3
    fitting = max((room - spare) / takes.mean, room // takes.largest, 1)
    return min(samples, math.ceil(samples / fitting))


def _draw(bound: int, *key: object) -> int:
    """An integer in [0, bound), fixed by the key on every machine and version."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big") % bound


@dataclass(frozen=True)
class _Leaf:
    count: int
    domain: int


@dataclass(frozen=True)
class _Split:
    """Items that go left as evenly as integers allow: among the first p, ⌊(p·left + phase) / count⌋."""

    count: int
    phase: int
    left: "_Leaf | _Split"
    right: "_Leaf | _Split"

    def lefts(self, position: int) -> int:
        return (position * self.left.count + self.phase) // self.count


@dataclass(frozen=True)
class Arrangement:
    """Which domain stands at which position of an epoch, each spread evenly.

    Positions are divided among the domains by a binary tree of two-way splits. A two-way split that is as even as
    integers allow is a closed formula, so any stretch of the epoch is computed directly, in any order and by anyone.
    In any window a child's count is within 1 of its share of its parent's, which bounds the deviation of every domain
    (`deviation`); among seeded trees the one with the smallest bound is taken.

    `counts` are samples per domain, `names` their domains (which seed the draw, so that their order is irrelevant).
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    seed: int

    @property
    def samples(self) -> int:
        """The length of the epoch."""
        return sum(self.counts)

    @cached_property
    def _tree(self) -> _Leaf | _Split:
        best: tuple[float, _Leaf | _Split] | None = None
        for candidate in range(CANDIDATES):
            tree = self._candidate(candidate)
            bound = self._bound(tree)
            if best is None or bound < best[0]:
                best = bound, tree
        if best is None:
            raise MixtureError("an epoch needs at least one sample")
        return best[1]

    def _candidate(self, number: int) -> _Leaf | _Split:
        """A Huffman tree over the counts, jittered by up to a factor 2 so that candidates differ."""
        heap: list[tuple[int, str, _Leaf | _Split]] = []
        for domain, (name, count) in enumerate(zip(self.names, self.counts, strict=True)):
            if count:
                jitter = 256 + (_draw(256, self.seed, "jitter", number, name) if number else 0)
                heap.append((count * jitter, name, _Leaf(count, domain)))
        heapq.heapify(heap)
        while len(heap) > 1:
            (low, name, right), (high, other, left) = heapq.heappop(heap), heapq.heappop(heap)
            count = left.count + right.count
            key = min(name, other)
            phase = _draw(count, self.seed, "phase", number, key, count)
            heapq.heappush(heap, (low + high, key, _Split(count, phase, left, right)))
        return heap[0][2]

    def _bound(self, tree: _Leaf | _Split) -> float:
        """The largest deviation from its share that any domain's count can have in any window of WINDOW."""
        worst = 0.0
        stack = [(tree, min(WINDOW, tree.count), min(WINDOW, tree.count))]
        while stack:
            node, low, high = stack.pop()
            if isinstance(node, _Leaf):
                share = min(WINDOW, self.samples) * node.count / self.samples
                worst = max(worst, high - share, share - low)
                continue
            for child in (node.left, node.right):
                stack.append((child, low * child.count // node.count, -(-high * child.count // node.count)))
        return worst

    @property
    def deviation(self) -> float:
        """A bound on |count - share| over all domains and all windows of WINDOW consecutive samples."""
        return self._bound(self._tree)

    def before(self, position: int) -> npt.NDArray[np.int64]:
        """How many samples of each domain stand before a position: shape (domains,)."""
        counts = np.zeros(len(self.names), np.int64)
        stack = [(self._tree, position)]
        while stack:
            node, place = stack.pop()
            if isinstance(node, _Leaf):
                counts[node.domain] = place
            else:
                left = node.lefts(place)
                stack += [(node.left, left), (node.right, place - left)]
        return counts

    def stretch(self, start: int, stop: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The domain at each position of [start, stop), and the how-manieth of its domain in the epoch it is."""
        domains = np.empty(stop - start, np.int32)
        ranks = np.empty(stop - start, np.int64)
        stack = [(self._tree, start, np.arange(stop - start))]
        while stack:
            node, first, slots = stack.pop()
            if isinstance(node, _Leaf):
                domains[slots] = node.domain
                ranks[slots] = first + np.arange(len(slots))
                continue
            # Split off the whole part in Python's integers: first × count passes 2^63 at 10^10 samples.
            left, rest = divmod(first * node.left.count + node.phase, node.count)
            steps = np.arange(len(slots) + 1, dtype=np.int64) * node.left.count + rest
            goes_left = np.diff(steps // node.count) > 0
            stack += [(node.left, left, slots[goes_left]), (node.right, first - left, slots[~goes_left])]
        return domains, ranks


def arrangement(plan: Plan) -> Arrangement:
    """The order of a plan's epoch."""
    return Arrangement(
        names=tuple(plan.domains), counts=tuple(domain.count for domain in plan.domains.values()), seed=plan.seed
    )


def shard_bounds(plan: Plan) -> Sequence[tuple[int, int]]:
    """The stretch of the epoch each shard holds: equal to ±1 sample."""
    edges = [number * plan.samples // plan.shards for number in range(plan.shards + 1)]
    return list(itertools.pairwise(edges))
