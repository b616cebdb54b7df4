"""The knowledge distribution and its error bars, from every sample's probabilities."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtmix import estimate
from vtmix.errors import DetectionError
from vtmix.samples import Block, blocks_of, control_blocks, probability_columns


def frame(iterations: list[list[tuple[float, ...]]], domains: tuple[str, ...] = ("a", "b")) -> pl.DataFrame:
    """Samples from each iteration's rows of probabilities, the last of a row being unclassified."""
    rows = [(number, *row) for number, found in enumerate(iterations, start=1) for row in found]
    return pl.DataFrame(rows, schema=["iteration", *probability_columns(domains)], orient="row")


def test_means_errors_and_spread_of_a_worked_example():
    samples = frame([[(0.8, 0.2, 0.0), (0.4, 0.2, 0.4)], [(0.5, 0.5, 0.0), (0.3, 0.7, 0.0)]])
    share = estimate.shares(samples, ["a", "b"])["a"]
    assert share.mean == pytest.approx(0.5)  # (0.6 + 0.4) / 2
    assert share.spread == pytest.approx(math.sqrt(0.02))  # of 0.6 and 0.4
    deviation = math.sqrt((0.09 + 0.01 + 0.0 + 0.04) / 4)  # of 0.8, 0.4, 0.5, 0.3
    assert share.standard_error == pytest.approx(deviation / 2, rel=0.1)
    assert estimate.unclassified(samples) == pytest.approx(0.1)
    assert estimate.distribution(estimate.shares(samples, ["a", "b"])) == pytest.approx({"a": 5 / 9, "b": 4 / 9})


def test_one_iteration_has_no_spread():
    assert estimate.shares(frame([[(0.8, 0.2, 0.0), (0.4, 0.6, 0.0)]]), ["a", "b"])["a"].spread == 0


def test_one_sample_has_no_error():
    share = estimate.shares(frame([[(0.8, 0.2, 0.0)]]), ["a", "b"])["a"]
    assert (share.mean, share.standard_error) == pytest.approx((0.8, 0))


def test_intervals_stay_within_the_simplex():
    shares = estimate.shares(frame([[(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]]), ["a", "b"])
    assert (shares["a"].low, shares["a"].high) == (0, 1)


def drawn(truth: tuple[float, ...], confusion: np.ndarray, samples: int, seed: int) -> pl.DataFrame:
    """Samples of hard labels: a domain by the truth, a label by its row of the confusion matrix."""
    rng = np.random.default_rng(seed)
    domains = rng.choice(len(truth), size=samples, p=truth)
    labels = [rng.choice(confusion.shape[1], p=confusion[domain]) for domain in domains]
    return frame([[tuple(row) for row in np.eye(confusion.shape[1])[labels]]])


CONFUSION = np.array([[0.9, 0.05, 0.05], [0.2, 0.8, 0.0]])
"""True domains a and b, labelled a, b or neither."""


def labelled(texts: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {domain: np.eye(3)[rng.choice(3, size=texts, p=row)] for domain, row in zip("ab", CONFUSION, strict=True)}


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = (0.3, 0.7)
    raw = held = 0
    for seed in range(60):
        samples = drawn(truth, CONFUSION, 600, seed)
        share = estimate.shares(samples, ["a", "b"], seed)["a"]
        raw += share.low <= (truth @ CONFUSION)[0] <= share.high
        mended = estimate.corrected(samples, labelled(150, seed + 1000), seed)["a"]
        held += mended.low <= truth[0] <= mended.high
    assert raw >= 52
    assert held >= 52


@given(st.floats(0.02, 0.98))
@settings(max_examples=20)
def test_a_known_confusion_is_undone_exactly(share):
    observed = np.array([share, 1 - share]) @ CONFUSION
    rows = [tuple(observed)] * 4
    judged = {domain: np.tile(row, (3, 1)) for domain, row in zip("ab", CONFUSION, strict=True)}
    found = estimate.corrected(frame([rows]), judged)
    assert found["a"].mean == pytest.approx(share, abs=1e-9)
    assert found["a"].mean + found["b"].mean == pytest.approx(1, abs=1e-12)
    assert estimate.shares(frame([rows]), ["a", "b"])["a"].mean == pytest.approx(observed[0])


def test_what_no_domain_could_have_caused_is_corrected_to_none_of_it():
    # More b than even pure b explains: the share of a is 0, not negative.
    judged = {domain: np.tile(row, (3, 1)) for domain, row in zip("ab", CONFUSION, strict=True)}
    found = estimate.corrected(frame([[(0.1, 0.9, 0.0)] * 5]), judged)
    assert (found["a"].mean, found["b"].mean) == (0, 1)


# --- early stop ------------------------------------------------------------------------------------------------------


def rounds_of(blocks: int, size: int) -> tuple[list[list[Block]], dict[Block, pl.DataFrame]]:
    """Rounds of two iterations, and each block's samples, half of them all a, half all b."""
    cut = blocks_of(2, blocks * size, size)
    rows = frame([[(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)] * (size // 2)])
    grouped = [list(cut[place : place + 2]) for place in range(0, len(cut), 2)]
    return grouped, dict.fromkeys(cut, rows)


@given(st.randoms(), st.sampled_from([0.02, 0.03, 0.05]))
@settings(max_examples=25)
def test_where_it_stops_does_not_depend_on_the_order_in_which_blocks_come(random, margin):
    rounds, samples = rounds_of(40, 100)
    shuffled = list(samples.items())
    random.shuffle(shuffled)
    stop = estimate.EarlyStop(rounds, ["a", "b"], margin)
    for block, found in shuffled:
        stop.take(block, found)
    # Variance 1/4: n = (1.96 / 2 margin)², in rounds of 200.
    assert stop.rounds == max(math.ceil((0.98 / margin) ** 2 / 200), estimate.FEWEST // 200)


@pytest.mark.parametrize("grouped", [False, True], ids=["labelled texts", "control group"])
@given(random=st.randoms())
@settings(max_examples=3)
def test_where_shares_are_corrected_the_corrected_ones_have_to_be_known(grouped, random):
    rounds, samples = rounds_of(40, 100)
    rng = np.random.default_rng(1)
    for block, rows in samples.items():
        samples[block] = rows.sample(fraction=1.0, with_replacement=True, seed=int(rng.integers(1 << 30)))
    judged = [[(0.7, 0.3, 0.0), (0.7, 0.3, 0.0)] * 1000, [(0.3, 0.7, 0.0), (0.3, 0.7, 0.0)] * 1000]
    control = control_blocks(2, 2000, 1000)
    if grouped:
        rows = frame(judged)
        samples |= {block: rows[block.start : block.stop] for block in control}
        stop = estimate.EarlyStop(rounds, ["a", "b"], 0.05, control=control)
    else:
        known = {domain: np.array(rows) for domain, rows in zip("ab", judged, strict=True)}
        stop = estimate.EarlyStop(rounds, ["a", "b"], 0.05, judged=known)
    shuffled = list(samples.items())
    random.shuffle(shuffled)
    for block, found in shuffled:
        stop.take(block, found)
    # A classifier that tells 0.7 from 0.3 widens intervals 1 / 0.4 times: (0.98 / (0.4 x 0.05))² samples.
    wanted = (0.98 / 0.4 / 0.05) ** 2
    assert 0.8 * wanted <= 200 * stop.rounds <= 1.3 * wanted
    taken = pl.concat([samples[block] for found in rounds[: stop.rounds] for block in found])
    known = {domain: np.array(rows) for domain, rows in zip("ab", judged, strict=True)}
    assert all(share.high - share.low <= 0.1 for share in estimate.corrected(taken, known).values())


def test_an_iteration_in_which_nothing_is_classified_leaves_the_others_estimate():
    rows = frame([[(0.5, 0.25, 0.25)] * 4, [(0.0, 0.0, 1.0)] * 4])
    judged = {"a": np.array([[1.0, 0.0, 0.0]] * 4), "b": np.array([[0.0, 1.0, 0.0]] * 4)}
    found = estimate.corrected(rows, judged)
    assert found["a"].mean == pytest.approx(2 / 3)


def test_without_a_margin_nothing_stops():
    rounds, samples = rounds_of(40, 100)
    stop = estimate.EarlyStop(rounds, ["a", "b"], None)
    for block, found in samples.items():
        stop.take(block, found)
    assert stop.rounds is None


def test_few_samples_and_silent_domains_are_not_taken_for_certainty():
    rounds, samples = rounds_of(40, 100)
    certain = frame([[(1.0, 0.0, 0.0)] * 100])
    stop = estimate.EarlyStop(rounds, ["a", "b"], 0.002)
    widths = []
    for block in samples:
        stop.take(block, certain)
        widths.append(stop.width())
    assert widths[:9] == [1.0] * 9
    assert widths[9] == pytest.approx(3 / 1000)
    assert stop.rounds == 8  # 1,600 samples: 3 / 1600 < 0.002


@pytest.mark.parametrize("margin", [0.3, 0.05, 0.01, 0.001])
def test_the_samples_a_margin_takes_are_those_it_stops_after(margin):
    n = estimate.samples_needed(margin)
    assert max(1.96 * 0.5 / math.sqrt(n), 3 / n) <= margin
    assert n == 1000 or max(1.96 * 0.5 / math.sqrt(n - 1), 3 / (n - 1)) > margin


def test_nothing_classified_is_no_estimate():
    with pytest.raises(DetectionError, match="none of the samples was classified"):
        estimate.distribution(estimate.shares(frame([[(0.0, 0.0, 1.0)]]), ["a", "b"]))


@st.composite
def iterations(draw) -> list[list[tuple[float, ...]]]:
    def row() -> tuple[float, ...]:
        masses = draw(st.tuples(*[st.floats(0, 1)] * 3).filter(lambda found: sum(found[:2]) > 0.1))
        return tuple(mass / sum(masses) for mass in masses)

    size = draw(st.integers(1, 5))
    return [[row() for _ in range(size)] for _ in range(draw(st.integers(1, 3)))]


@given(iterations())
def test_shares_and_unclassified_mass_account_for_every_sample(rows):
    samples = frame(rows)
    shares = estimate.shares(samples, ["a", "b"])
    assert sum(share.mean for share in shares.values()) + estimate.unclassified(samples) == pytest.approx(1, abs=1e-12)
    assert sum(estimate.distribution(shares).values()) == pytest.approx(1, abs=1e-12)
    assert all(0 <= share.low <= share.mean <= share.high <= 1 for share in shares.values())


@given(iterations())
def test_the_order_of_samples_and_of_iterations_does_not_matter(rows):
    turned = frame([list(reversed(found)) for found in reversed(rows)])
    for name, share in estimate.shares(turned, ["a", "b"]).items():
        assert share.mean == estimate.shares(frame(rows), ["a", "b"])[name].mean
    assert estimate.unclassified(turned) == estimate.unclassified(frame(rows))


@given(iterations())
def test_renaming_domains_renames_their_shares(rows):
    swapped = frame([[(second, first, rest) for first, second, rest in found] for found in rows])
    shares, other = (estimate.shares(found, ["a", "b"]) for found in (frame(rows), swapped))
    for left, right in (("a", "b"), ("b", "a")):
        assert shares[left].model_dump() == pytest.approx(other[right].model_dump(), abs=1e-12)


def test_a_resample_that_holds_nothing_classified_does_not_stop_the_correction():
    rows = [[(1.0, 0.0, 0.0)] + [(0.0, 0.0, 1.0)] * 2]
    judged = {"a": np.array([[0.9, 0.1, 0.0]]), "b": np.array([[0.1, 0.9, 0.0]])}
    assert estimate.corrected(frame(rows), judged)["a"].mean == pytest.approx(1)
