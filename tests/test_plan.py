"""Counts are exact, draws are fair, and the arrangement spreads every domain evenly: for any weights and sizes."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtmix import mds
from vtmix.artifacts import EvalSplit, PoolManifest, Weights
from vtmix.errors import MixtureError
from vtmix.plan import WINDOW, Arrangement, apportion, apportion_amounts, arrangement, make_plan, shard_bounds
from vtmix.simplex import normalise


@st.composite
def weights(draw, largest=64):
    size = draw(st.integers(1, largest))
    masses = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=size, max_size=size))
    if not any(masses):
        masses[0] = 1.0
    return normalise({f"d{number}": mass for number, mass in enumerate(masses)})


def pool(samples, name="law", size=1000):
    return PoolManifest(
        domain=name,
        samples=samples,
        tokens=samples * 100,
        response_tokens=samples * 50,
        bytes=samples * size,
        max_sample_bytes=size,
        records=samples,
        rejected=0,
        duplicates=0,
        truncated=0,
        overlong_dropped=0,
        leaks_dropped=0,
        eval=EvalSplit(samples=1, tokens=1, response_tokens=1, digest=""),
        parts=(),
    )


def plan_of(shares, sizes, epoch=1, previous=None, **changes):
    options = {"samples": 1000, "seed": 3, "shard_bytes": 1 << 26, **changes}
    return make_plan(Weights(epoch=epoch, weights=shares), sizes, previous=previous, **options)


def deviation(domains, counts):
    """The largest |count - share| over all domains and windows of WINDOW samples."""
    worst = 0.0
    for domain, count in enumerate(counts):
        running = np.concatenate([[0], np.cumsum(domains == domain)])
        share = WINDOW * count / len(domains)
        worst = max(worst, float(np.abs(running[WINDOW:] - running[:-WINDOW] - share).max()))
    return worst


@settings(max_examples=1000)
@given(weights(), st.integers(1, 10**9))
def test_counts_sum_to_the_epoch_and_are_within_one_of_their_share(shares, samples):
    counts = apportion(shares, samples)
    assert sum(counts.values()) == samples
    assert all(abs(counts[name] - share * samples) < 1 + 1e-6 for name, share in shares.items())
    assert all(counts[name] == 0 for name, share in shares.items() if share == 0)


@given(weights(), st.integers(1, 10**6), st.randoms())
def test_the_order_of_domains_never_changes_their_counts(shares, samples, random):
    names = list(shares)
    random.shuffle(names)
    assert apportion({name: shares[name] for name in names}, samples) == apportion(shares, samples)


def test_ties_go_by_name():
    assert apportion({"law": 1 / 3, "code": 1 / 3, "art": 1 / 3}, 4) == {"law": 1, "code": 1, "art": 2}


@settings(max_examples=200)
@given(weights(), st.integers(WINDOW, 5000), st.integers(0, 99))
def test_every_window_of_128_holds_each_domain_within_2_of_its_share(shares, samples, seed):
    counts = tuple(apportion(shares, samples).values())
    order = Arrangement(tuple(shares), counts, seed)
    domains, _ = order.stretch(0, samples)
    assert deviation(domains, counts) <= min(2.0, order.deviation + 1e-9)


@pytest.mark.parametrize(
    "shares",
    [
        [0.618**n for n in range(1, 9)],  # every split at its most uneven
        [0.45, 0.45] + [0.1 / 62] * 62,
        [0.25] * 3 + [0.2499, 0.0001],
        [1 / 64] * 64,
    ],
)
def test_shares_that_are_hard_to_spread_are_spread_too(shares):
    names = [f"d{number}" for number in range(len(shares))]
    counts = tuple(apportion(normalise(dict(zip(names, shares, strict=True))), 60_000).values())
    order = Arrangement(tuple(names), counts, 1)
    assert order.deviation <= 2.0
    assert deviation(order.stretch(0, sum(counts))[0], counts) <= order.deviation + 1e-9


@settings(max_examples=100)
@given(weights(12), st.integers(1, 2000), st.data())
def test_any_stretch_of_the_arrangement_is_what_walking_there_gives(shares, samples, data):
    counts = tuple(apportion(shares, samples).values())
    order = Arrangement(tuple(shares), counts, 5)
    domains, ranks = order.stretch(0, samples)
    for domain, count in enumerate(counts):
        assert ranks[domains == domain].tolist() == list(range(count))
    start = data.draw(st.integers(0, samples))
    stop = data.draw(st.integers(start, samples))
    some, their_ranks = order.stretch(start, stop)
    assert some.tolist() == domains[start:stop].tolist()
    assert their_ranks.tolist() == ranks[start:stop].tolist()
    assert order.before(start).tolist() == np.bincount(domains[:start], minlength=len(counts)).tolist()


def test_ten_billion_samples_are_arranged_without_overflow():
    counts = (6_000_000_001, 3_000_000_000, 999_999_999)
    order = Arrangement(("a", "b", "c"), counts, 1)
    start = order.samples - 1000
    domains, ranks = order.stretch(start, order.samples)
    expected = np.array(counts) - order.before(start)
    assert np.bincount(domains, minlength=3).tolist() == expected.tolist()
    assert ranks[domains == 0][-1] == counts[0] - 1


def test_another_seed_gives_another_order():
    counts = (500, 300, 200)
    one, other = (Arrangement(("a", "b", "c"), counts, seed).stretch(0, 1000)[0] for seed in (1, 2))
    assert (one != other).any()


@settings(max_examples=50)
@given(weights(6), st.lists(st.integers(1, 300), min_size=6, max_size=6), st.integers(1, 500), st.integers(0, 9))
def test_every_sample_is_drawn_equally_often_within_and_across_epochs(shares, sizes, samples, seed):
    pools = {name: pool(size, name) for name, size in zip(shares, sizes, strict=False)}
    drawn = {name: Counter() for name in shares}
    previous = None
    for epoch in (1, 2, 3):
        previous = plan_of(shares, pools, epoch, previous, samples=samples, seed=seed)
        for name, domain in previous.domains.items():
            size = pools[name].samples
            drawn[name].update(place % size for place in range(domain.position, domain.position + domain.count))
    for name, counter in drawn.items():
        total, size = sum(counter.values()), pools[name].samples
        appearances = [counter[place] for place in range(size)]
        assert min(appearances) == total // size
        assert max(appearances) == -(-total // size)


def test_a_domain_of_weight_0_changes_nothing():
    pools = {"law": pool(100), "code": pool(50, "code"), "idle": pool(70, "idle")}
    without = plan_of({"law": 0.6, "code": 0.4}, {name: pools[name] for name in ("law", "code")})
    with_idle = plan_of({"law": 0.6, "idle": 0.0, "code": 0.4}, pools)
    assert {n: d for n, d in with_idle.domains.items() if n != "idle"} == dict(without.domains)
    names = np.array(["law", "idle", "code"])[arrangement(with_idle).stretch(0, 1000)[0]]
    assert names.tolist() == np.array(["law", "code"])[arrangement(without).stretch(0, 1000)[0]].tolist()


def test_two_epochs_differ_and_carry_on():
    pools = {"law": pool(300), "code": pool(300, "code")}
    first = plan_of({"law": 0.5, "code": 0.5}, pools, samples=200)
    second = plan_of({"law": 0.7, "code": 0.3}, pools, 2, first, samples=200)
    assert second.domains["law"].position == first.domains["law"].position + 100
    assert second.domains["law"].count == 140


@pytest.mark.parametrize(
    ("shares", "pools", "options", "sentence"),
    [
        ({"law": 0.5, "code": 0.5}, {"law": pool(9), "code": pool(0, "code")}, {}, "'code' has weight 0.5 but"),
        ({"law": 1.0}, {"law": pool(9)}, {"max_passes": 10}, r"'law' needs 1,000 samples, 111.11 passes over its pool"),
        ({"law": 1.0}, {"law": pool(9), "code": pool(9, "code")}, {}, "'code' has a pool but no weight"),
        ({"law": 0.5, "art": 0.5}, {"law": pool(9)}, {}, "'art' has a weight but no pool"),
        ({"law": 1.0}, {"law": pool(9, size=5000)}, {"shard_bytes": 4096}, r"takes 5,000 bytes, more than"),
    ],
)
def test_an_impossible_mixture_is_refused_by_name(shares, pools, options, sentence):
    with pytest.raises(MixtureError, match=sentence):
        plan_of(shares, pools, **options)


def test_every_domain_that_cannot_serve_is_named_at_once():
    with pytest.raises(MixtureError) as refusal:
        plan_of({"law": 0.5, "code": 0.5}, {"law": pool(0), "code": pool(0, "code")})
    assert "'law'" in str(refusal.value)
    assert "'code'" in str(refusal.value)


def test_a_pool_that_changed_between_epochs_is_refused():
    first = plan_of({"law": 1.0}, {"law": pool(300)})
    with pytest.raises(MixtureError, match="is not the one epoch 1 drew from"):
        plan_of({"law": 1.0}, {"law": pool(301)}, 2, first)


@settings(max_examples=50)
@given(st.integers(1, 100_000), st.integers(12, 26))
def test_shards_tile_the_epoch_in_equal_parts(samples, power):
    found = plan_of({"law": 1.0}, {"law": pool(500)}, samples=samples, shard_bytes=1 << power)
    bounds = shard_bounds(found)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == samples
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    sizes = {stop - start for start, stop in bounds}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) * 1004 + mds.Layout(1 << power).header_bytes(0) <= 1 << power


def test_a_plan_of_ten_billion_samples_over_a_thousand_domains_takes_under_a_second():
    names = [f"d{number}" for number in range(1000)]
    shares = normalise({name: 1.0 + number for number, name in enumerate(names)})
    pools = {name: pool(10_000, name) for name in names}
    start = time.process_time()  # what else the machine does is not the plan's
    found = plan_of(shares, pools, samples=10**10)
    assert time.process_time() - start < 1
    assert sum(domain.count for domain in found.domains.values()) == 10**10


# Weights as shares of tokens


@st.composite
def lengths(draw):
    """Token counts of the samples of a few pools."""
    names = [f"d{number}" for number in range(draw(st.integers(1, 5)))]
    return {name: draw(st.lists(st.integers(1, 900), min_size=1, max_size=30)) for name in names}


def counted(tokens, position):
    """The count from a position on whose tokens come nearest to an amount, by walking there."""

    def nearest(amount):
        count, total = 0, 0
        while total < amount:
            total += tokens[(position + count) % len(tokens)]
            count += 1
        last = tokens[(position + count - 1) % len(tokens)]
        return count - 1 if count and amount - (total - last) <= total - amount else count

    return nearest


@given(lengths(), st.integers(1, 400), st.data())
def test_token_counts_sum_to_the_epoch_and_their_tokens_are_within_two_samples_of_their_share(pools, samples, data):
    masses = data.draw(st.lists(st.integers(1, 9), min_size=len(pools), max_size=len(pools)))
    shares = normalise(dict(zip(pools, masses, strict=True)))
    nearest = {name: counted(tokens, 3) for name, tokens in pools.items()}
    counts = apportion_amounts(shares, samples, nearest, 1.0)
    assert sum(counts.values()) == samples
    total = {
        name: sum(tokens[(3 + place) % len(tokens)] for place in range(counts[name])) for name, tokens in pools.items()
    }
    for name, found in total.items():
        assert abs(found - shares[name] * sum(total.values())) <= 2 * 900 + len(pools) * 900
    assert apportion_amounts(dict(reversed(shares.items())), samples, nearest, 1e4) == counts


def test_a_domain_of_weight_0_gets_no_tokens():
    nearest = {"a": counted([10], 0), "b": counted([20], 0)}
    assert apportion_amounts({"a": 1.0, "b": 0.0}, 7, nearest, 1.0) == {"a": 7, "b": 0}


class Lengths:
    """A pool that is nothing but token counts."""

    def __init__(self, size, mean, seed):
        self.tokens = np.random.default_rng(seed).geometric(1 / mean, size)
        self.sums = np.concatenate([[0], np.cumsum(self.tokens)])

    def measured(self, position, count, measure):
        return self._before(position + count) - self._before(position)

    def nearest(self, position, amount, measure):
        passes, rest = divmod(self._before(position) + amount, self.sums[-1])
        place = int(np.searchsorted(self.sums, rest))
        place -= place > 0 and rest - self.sums[place - 1] < self.sums[place] - rest
        return max(0, int(passes) * len(self.tokens) + place - position)

    def _before(self, position):
        passes, place = divmod(position, len(self.tokens))
        return int(passes * self.sums[-1] + self.sums[place])

    @property
    def manifest(self):
        size, total = len(self.tokens), int(self.sums[-1])
        return pool(size).model_copy(update={"tokens": total, "response_tokens": total})


@pytest.mark.parametrize("unit", ["tokens", "response_tokens"])
def test_pools_of_100_000_samples_give_proportions_by_token_within_a_thousandth(unit):
    shares = {"law": 0.5, "code": 0.3, "other": 0.2}
    supplies = {"law": Lengths(100_000, 300, 1), "code": Lengths(150_000, 40, 2), "other": Lengths(100_000, 900, 3)}
    manifests = {name: supply.manifest for name, supply in supplies.items()}
    for samples in (60_000, 400_000):
        plan = plan_of(shares, manifests, samples=samples, unit=unit, supplies=supplies)
        assert sum(domain.count for domain in plan.domains.values()) == samples
        total = sum(domain.tokens for domain in plan.domains.values())
        for name, domain in plan.domains.items():
            assert domain.tokens / total == pytest.approx(shares[name], abs=1e-3)
            assert domain.tokens == supplies[name].measured(domain.position, domain.count, unit)


def test_a_pool_without_a_response_token_cannot_have_a_share_of_them():
    empty = pool(10).model_copy(update={"response_tokens": 0})
    with pytest.raises(MixtureError, match="its pool holds no response_tokens"):
        plan_of({"law": 1.0}, {"law": empty}, unit="response_tokens", supplies={"law": Lengths(10, 5, 1)})
