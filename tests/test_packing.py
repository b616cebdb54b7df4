"""Packing loses nothing and wastes little, and every stretch of its sequences resembles the mixture."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vtmix.packing import fullness, pack, spread

LENGTH = 64
lengths_of_samples = st.lists(st.integers(1, LENGTH), min_size=1, max_size=200)


def packed(lengths, capacity=LENGTH):
    """The sequence of each sample, and the tokens of each sequence."""
    sequences = pack(np.array(lengths, np.int64), capacity)
    return sequences, np.bincount(sequences, weights=lengths).astype(int)


def texts(count, seed=0):
    """Lengths like those of texts: many short ones, a few that fill a sequence of 2048."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.9, count).astype(np.int64), 4, 2048)


@given(lengths_of_samples)
def test_every_sample_goes_to_one_sequence_and_none_overflows_or_stays_empty(lengths):
    sequences, filled = packed(lengths)
    assert len(sequences) == len(lengths)
    assert sequences.min() == 0
    assert 0 < filled.min() <= filled.max() <= LENGTH
    assert filled.sum() == sum(lengths)


@given(lengths_of_samples)
def test_a_sample_goes_where_the_least_room_is_left(lengths):
    sequences, _ = packed(lengths)
    rooms = [LENGTH] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        chosen = sequences[sample]
        assert rooms[chosen] == min(room for room in rooms if room >= lengths[sample])
        rooms[chosen] -= lengths[sample]


@given(lengths_of_samples)
def test_all_sequences_but_one_are_fuller_than_the_number_of_shards_relies_on(lengths):
    _, filled = packed(lengths)
    assert all(tokens > fullness(LENGTH, max(lengths)) for tokens in sorted(filled)[1:])


def test_sequences_of_texts_are_99_percent_full():
    lengths = texts(20_000)
    _, filled = packed(lengths, 2048)
    assert lengths.sum() / (len(filled) * 2048) > 0.99


def test_a_hundred_thousand_samples_are_packed_and_put_in_order_in_a_second():
    lengths = texts(100_000)
    start = time.process_time()
    sequences = pack(lengths, 2048)
    spread(np.ones((sequences.max() + 1, 6), np.int64), (7, 0))
    assert time.process_time() - start < 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=300), st.integers(0, 99))
def test_an_order_holds_every_sequence_once_and_is_that_of_its_seed(counts, seed):
    found = spread(np.array(counts), (seed, 0))
    assert sorted(found) == list(range(len(counts)))
    assert found.tolist() == spread(np.array(counts), (seed, 0)).tolist()


def test_the_order_in_which_domains_are_listed_changes_no_place():
    counts = np.random.default_rng(1).integers(0, 9, (400, 4))
    assert spread(counts, (7, 0)).tolist() == spread(counts[:, ::-1], (7, 0)).tolist()


def test_every_stretch_is_several_times_nearer_to_the_mixture_than_at_random():
    rng = np.random.default_rng(2)
    lengths, domains = texts(20_000), rng.choice(4, 20_000, p=[0.5, 0.3, 0.15, 0.05])
    lengths[domains == 0] = np.minimum(3 * lengths[domains == 0], 2048)  # one domain is of longer texts
    sequences = pack(lengths, 2048)
    counts = np.bincount(4 * sequences + domains, minlength=4 * (sequences.max() + 1)).reshape(-1, 4)

    def deviation(order, stretch):
        sums = np.cumsum(counts[order] - counts.mean(axis=0), axis=0)
        return np.abs(sums[stretch:] - sums[:-stretch])

    for stretch in (64, 128, 512):
        mine, random = deviation(spread(counts, (7, 0)), stretch), deviation(rng.permutation(len(counts)), stretch)
        assert mine.mean() < random.mean() / 3, stretch
        assert mine.max() < random.max() / 2, stretch
