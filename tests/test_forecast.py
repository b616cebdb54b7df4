"""What a detection takes on other devices follows from the rates measured on this one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtmix import forecast
from vtmix.errors import DamageError, MissingError
from vtmix.forecast import Rates, Size, Stopwatch, measured, seconds

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


@pytest.mark.parametrize(("tokens", "texts"), [(0, 5.0), (5.0, 0), (-1.0, 5.0), (float("nan"), 5.0)])
def test_a_run_that_generated_nothing_measured_nothing_that_a_forecast_could_rest_on(tmp_path, tokens, texts):
    path = tmp_path / forecast.RATES
    rates = {"engine": "x", "tokens_per_s": tokens, "texts_per_s": texts, "start_s": 1.0}
    path.write_text(json.dumps(rates) + "\n")
    with pytest.raises(MissingError, match="from which nothing follows: give --tokens-per-second"):
        measured(path)


def test_a_silent_model_is_logged_and_not_forecast_from(tmp_path):
    path = tmp_path / forecast.RATES
    watch = Stopwatch("transformers", 1, 1)
    watch.take(16, 0, 1.0, 0.5)
    watch.append(path)
    with pytest.raises(MissingError, match="the last run generated 0 tokens/s"):
        measured(path)


def test_a_detection_stops_at_the_end_of_a_round():
    assert forecast.whole_rounds(9604, iterations=5, block=256) == 10_240
    assert forecast.whole_rounds(10_240, iterations=5, block=256) == 10_240
    assert forecast.whole_rounds(10_241, iterations=5, block=256) == 11_520


def test_the_table_names_every_size_and_count_of_devices():
    lines = forecast.lines(RATES, [forecast.PAPER, Size("few", 1000, 16)], block=256)
    assert lines[1].split() == ["1", "actor", "8", "actors", "64", "actors"]
    assert lines[2].startswith("the paper's 5 x 40,000 samples of 256 tokens ")
    assert "14 h 14 min" in lines[2]  # 51.2 million tokens at 1,000 a second, and the start
    assert lines[3].startswith("few ")
    assert "38 s" in lines[3]  # as many samples of its own length, the last block of 232 classified after that
    assert len({len(line) for line in lines[1:]}) == 1
