"""The knowledge distribution and its error bars, from every sample's probabilities."""

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtmix import estimate
from vtmix.errors import DetectionError
from vtmix.samples import probability_columns


def frame(iterations: list[list[tuple[float, ...]]], domains: tuple[str, ...] = ("a", "b")) -> pl.DataFrame:
    """Samples from each iteration's rows of probabilities, the last of a row being unclassified."""
    rows = [(number, *row) for number, found in enumerate(iterations, start=1) for row in found]
    return pl.DataFrame(rows, schema=["iteration", *probability_columns(domains)], orient="row")


def test_means_errors_and_spread_of_a_worked_example():
    samples = frame([[(0.8, 0.2, 0.0), (0.4, 0.2, 0.4)], [(0.5, 0.5, 0.0), (0.3, 0.7, 0.0)]])
    share = estimate.shares(samples, ["a", "b"])["a"]
    assert share.mean == pytest.approx(0.5)  # (0.6 + 0.4) / 2
    assert share.spread == pytest.approx(math.sqrt(0.02))  # of 0.6 and 0.4
    deviation = math.sqrt((0.09 + 0.01 + 0.0 + 0.04) / 3)
    assert share.standard_error == pytest.approx(deviation / 2)
    assert (share.low, share.high) == pytest.approx((0.5 - 1.96 * deviation / 2, 0.5 + 1.96 * deviation / 2))
    assert estimate.unclassified(samples) == pytest.approx(0.1)
    assert estimate.distribution(estimate.shares(samples, ["a", "b"])) == pytest.approx({"a": 5 / 9, "b": 4 / 9})


def test_one_iteration_has_no_spread():
    assert estimate.shares(frame([[(0.8, 0.2, 0.0), (0.4, 0.6, 0.0)]]), ["a", "b"])["a"].spread == 0


def test_one_sample_has_no_error():
    share = estimate.shares(frame([[(0.8, 0.2, 0.0)]]), ["a", "b"])["a"]
    assert (share.mean, share.standard_error) == (0.8, 0)


def test_intervals_stay_within_the_simplex():
    shares = estimate.shares(frame([[(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]]), ["a", "b"])
    assert (shares["a"].low, shares["a"].high) == (0, 1)


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
    assert estimate.shares(turned, ["a", "b"]) == estimate.shares(frame(rows), ["a", "b"])
    assert estimate.unclassified(turned) == estimate.unclassified(frame(rows))


@given(iterations())
def test_renaming_domains_renames_their_shares(rows):
    swapped = frame([[(second, first, rest) for first, second, rest in found] for found in rows])
    shares, other = (estimate.shares(found, ["a", "b"]) for found in (frame(rows), swapped))
    assert (shares["a"], shares["b"]) == (other["b"], other["a"])
