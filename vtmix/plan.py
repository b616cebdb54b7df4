"""Weights → counts → which sample stands where: pure arithmetic on a few numbers, whatever the size of the epoch.

Counts are a largest remainder. Each domain keeps a position in the endless repetition of its pool, which carries over
epochs, so no sample repeats before its whole pool was seen. The order within an epoch is an `Arrangement`: a function
from positions to domains, computable anywhere in the epoch without walking there.
"""

import functools
import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vtmix import mds
from vtmix.artifacts import DomainPlan, Plan, PoolManifest, Weights
from vtmix.errors import MixtureError, listing
from vtmix.packing import fullness
from vtmix.settings import Packing, Unit

WINDOW = 128
"""The window in which every domain's count is held near its share: the paper's batch."""
CANDIDATES = 64
CONFIDENCE = 20
"""A shard exceeds its cap with a chance of at most e^-20."""


class Supply(Protocol):
    """A pool that can be measured."""

    def measured(self, position: int, count: int, measure: Literal["tokens", "response_tokens", "sample_bytes"]) -> int:
        """The tokens, response tokens or bytes of a window."""
        ...

    def nearest(self, position: int, amount: float, measure: Literal["tokens", "response_tokens"]) -> int:
        """How many samples from a position on come nearest to an amount."""
        ...


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


def apportion_amounts(
    weights: Mapping[str, float], samples: int, nearest: Mapping[str, Callable[[float], int]], estimate: float
) -> dict[str, int]:
    """Integer counts that sum to `samples`, with amounts (tokens) in the proportions of the weights.

    `nearest[name](amount)` is the count whose amount is nearest; it never falls as the amount grows. The whole amount
    is found by bisection, beginning at `estimate`. Where domains step at once, the remaining samples, fewer than
    domains, go to those with the largest weights.
    """
    used = {name: weight for name, weight in weights.items() if weight}

    def counts(amount: float) -> dict[str, int]:
        return {name: nearest[name](weight * amount) for name, weight in used.items()}

    low, high = 0.0, max(estimate, 1.0)
    while sum(counts(high).values()) <= samples:
        low, high = high, 2 * high
    while high - low > max(1e-3, 1e-12 * high):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) <= samples else (low, middle)
    found = counts(low)
    by_weight = sorted(used, key=lambda name: (-used[name], name))
    for name in itertools.islice(itertools.cycle(by_weight), samples - sum(found.values())):
        found[name] += 1
    return {name: found.get(name, 0) for name in weights}


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
    unit: Unit = "samples",
    supplies: Mapping[str, Supply] | None = None,
) -> Plan:
    """The plan of an epoch of `samples` samples.

    `previous` is the plan of the epoch before; without one, each domain starts at a position drawn from the seed. With
    `supplies`, the pools themselves, the plan tells tokens and bytes, and the weights may be shares of tokens. Raises
    MixtureError listing every domain whose pool cannot serve its weight. From `packing` follows the number of shards
    alone.
    """
    _refuse_strangers(weights, pools)
    positions = {name: _position(name, pool, seed, previous) for name, pool in pools.items()}
    if unit == "samples":
        counts = apportion(weights.weights, samples)
    else:
        _refuse_empty(weights, pools, unit)
        counts = _counts_by_tokens(weights, pools, positions, samples, unit, supplies or {})
    layout = mds.Layout(shard_bytes, packing=packing)
    _refuse_unservable(weights, pools, counts, layout, max_passes)
    domains = {
        name: DomainPlan(
            weight=weights.weights[name],
            count=count,
            position=positions[name],
            pool_samples=pools[name].samples,
            pool=pools[name].fingerprint(),
            passes=count / pools[name].samples if pools[name].samples else 0.0,
            unique=min(count, pools[name].samples),
            **_measures(supplies, name, positions[name], count),
        )
        for name, count in counts.items()
    }
    return Plan(
        inputs={
            "samples": samples,
            "unit": unit,
            "seed": seed,
            "shard_bytes": shard_bytes,
            "packing": packing and packing.model_dump(),
            "weights": dict(weights.weights),
            "pools": {name: pools[name].fingerprint() for name in weights.weights},
            "previous_plan": previous.fingerprint() if previous else None,
        },
        epoch=weights.epoch,
        knowledge=weights.knowledge,
        unit=unit,
        samples=samples,
        shards=_shards(counts, pools, layout),
        seed=seed,
        domains=domains,
    )


def _measures(supplies: Mapping[str, Supply] | None, name: str, position: int, count: int) -> dict[str, int]:
    if supplies is None:
        return {}
    return {
        "tokens": supplies[name].measured(position, count, "tokens") if count else 0,
        "response_tokens": supplies[name].measured(position, count, "response_tokens") if count else 0,
        "bytes": supplies[name].measured(position, count, "sample_bytes") if count else 0,
    }


def _counts_by_tokens(
    weights: Weights,
    pools: Mapping[str, PoolManifest],
    positions: Mapping[str, int],
    samples: int,
    unit: Literal["tokens", "response_tokens"],
    supplies: Mapping[str, Supply],
) -> dict[str, int]:
    used = [name for name, weight in weights.weights.items() if weight]
    per_token = sum(
        weights.weights[name] * pools[name].samples / getattr(pools[name], unit) for name in used
    )  # samples that one token of the mixture takes
    nearest = {name: functools.partial(_nearest, supplies[name], positions[name], unit) for name in used}
    return apportion_amounts(weights.weights, samples, nearest, samples / per_token)


def _nearest(supply: Supply, position: int, unit: Literal["tokens", "response_tokens"], amount: float) -> int:
    return supply.nearest(position, amount, unit)


def _refuse_strangers(weights: Weights, pools: Mapping[str, PoolManifest]) -> None:
    unknown = [f"domain '{name}' has a weight but no pool: build its pool" for name in weights.weights.keys() - pools]
    unknown += [f"domain '{name}' has a pool but no weight: give it one" for name in pools.keys() - weights.weights]
    if unknown:
        raise MixtureError(listing(sorted(unknown)))


def _refuse_empty(weights: Weights, pools: Mapping[str, PoolManifest], unit: Unit) -> None:
    offenders = [
        f"domain '{name}' has weight {weight:.4g} but its pool holds no {unit}: add samples, or set its weight to 0"
        for name, weight in weights.weights.items()
        if weight and not getattr(pools[name], unit)
    ]
    if offenders:
        raise MixtureError(listing(offenders))


def _refuse_unservable(
    weights: Weights,
    pools: Mapping[str, PoolManifest],
    counts: Mapping[str, int],
    layout: mds.Layout,
    max_passes: float | None,
) -> None:
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

    def place(self, child: "_Leaf | _Split", rank: int) -> int:
        """Where the child's item number `rank` (from 0) stands: the inverse of lefts."""
        if child is self.left:
            return -(((rank + 1) * self.count - self.phase) // -self.left.count) - 1
        return (rank * self.count + self.phase) // self.right.count


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

    @functools.cached_property
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

    def position(self, domain: int, rank: int) -> int:
        """Where in the epoch a domain's sample number `rank` (from 0) stands: the inverse of `stretch`."""
        path: list[tuple[_Split, _Leaf | _Split]] = []
        stack: list[tuple[_Leaf | _Split, list[tuple[_Split, _Leaf | _Split]]]] = [(self._tree, [])]
        while stack:
            node, above = stack.pop()
            if isinstance(node, _Split):
                stack += [(child, [*above, (node, child)]) for child in (node.left, node.right)]
            elif node.domain == domain:
                path = above
        for node, child in reversed(path):
            rank = node.place(child, rank)
        return rank

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


def shard_of(plan: Plan, position: int) -> tuple[int, int]:
    """The shard that holds a position of the epoch, and the place within it: the inverse of shard_bounds."""
    number = ((position + 1) * plan.shards - 1) // plan.samples
    return number, position - number * plan.samples // plan.shards
