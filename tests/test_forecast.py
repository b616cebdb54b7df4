"""What a detection takes on other devices follows from the rates measured on this one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtmix import forecast
from vtmix.errors import DamageError, MissingError
from vtmix.forecast import Rates, Stopwatch, measured, seconds

RATES = Rates("transformers", tokens_per_s=1000, texts_per_s=100, start_s=20)


def test_one_actor_takes_its_start_and_its_tokens():
    took = seconds(RATES, samples=100, max_tokens=10, block=10, generating=1, classifying=1)
    # Ten blocks of 0.1 s each; the last one is classified after that.
    assert took == pytest.approx(20 + 1 + 0.1)


def test_the_slower_stage_sets_the_pace():
    slow = Rates("x", tokens_per_s=1000, texts_per_s=10, start_s=0)
    assert seconds(slow, samples=100, max_tokens=10, block=10, generating=1, classifying=1) == pytest.approx(0.1 + 10)
    assert seconds(slow, samples=100, max_tokens=10, block=10, generating=1, classifying=10) == pytest.approx(1 + 1)


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_more_actors_never_take_longer_and_never_less_than_their_share(samples, block, generating, classifying):
    def took(actors: int) -> float:
        return seconds(RATES, samples=samples, max_tokens=8, block=block, generating=actors, classifying=classifying)

    assert took(generating + 1) <= took(generating) + 1e-9
    assert took(generating) >= RATES.start_s + samples * 8 / RATES.tokens_per_s / generating - 1e-9


def test_what_was_measured_last_counts(tmp_path):
    path = tmp_path / forecast.RATES
    with pytest.raises(MissingError, match="nothing was measured yet"):
        measured(path)
    for speed in (100, 400):
        watch = Stopwatch("transformers", 2, 1)
        watch.take(10, speed, 1.0, 0.5)
        watch.take(30, speed, 1.0, 0.5)
        watch.append(path)
    rates = measured(path)
    assert (rates.tokens_per_s, rates.texts_per_s) == (400, 40)
    line = json.loads(path.read_text().splitlines()[-1])
    assert (line["samples"], line["generating_actors"], line["classifying_actors"]) == (40, 2, 1)
    path.write_text("{}\n")
    with pytest.raises(DamageError, match=r"rates\.jsonl"):
        measured(path)


def test_a_run_that_drew_nothing_measures_nothing(tmp_path):
    Stopwatch("transformers", 1, 1).append(tmp_path / forecast.RATES)
    assert not (tmp_path / forecast.RATES).exists()


def test_the_table_names_every_plan_and_count_of_devices():
    lines = forecast.lines(RATES, [("all", 200_000), ("few", 1000)], max_tokens=256, block=256)
    assert lines[1].split() == ["1", "actor", "8", "actors", "64", "actors"]
    assert lines[2].startswith("all")
    assert "14 h 14 min" in lines[2]  # 51.2 million tokens at 1,000 a second, and the start
    assert lines[3].startswith("few")
