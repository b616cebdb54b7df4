"""Two pools of Ray actors work at the same time, and give back what they reserved when they are stopped early."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_detect import wait_until

from vtmix import stages
from vtmix.classify import sound
from vtmix.cluster import Reserved
from vtmix.errors import ConfigError, DetectionError
from vtmix.samples import Parts, Sample, blocks_of
from vtmix.settings import Resources
from vtmix.stages import Stage

pytestmark = pytest.mark.slow

SECONDS = 0.3
PARTS = Parts(Path("nowhere"), ("law", "code"), blocks_of(1, 24, 2), 1, {})
BLOCKS = dict.fromkeys(PARTS.blocks, ())


class SlowSampler:
    def __call__(self, seeds, openings):
        time.sleep(SECONDS)
        return [Sample("text", (1, 2), "stop") for _ in seeds]


class SlowClassifier:
    def __call__(self, texts):
        time.sleep(SECONDS)
        return np.tile([0.25, 0.5, 0.25], (len(texts), 1))


class Waiting:
    """Says how its threads wait."""

    def __call__(self, seeds, openings):
        return [Sample(os.environ.get("GOMP_SPINCOUNT", "unset"), (), "stop") for _ in seeds]


class GivesUp:
    def __call__(self, texts):
        raise DetectionError("the judge has gone home")


@pytest.fixture(scope="module", autouse=True)
def _classes_travel_with_the_job():
    """Workers cannot import the tests."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def stage(make, cpus=0.5):
    return Stage(make, Resources(actors=1, cpus=cpus))


@pytest.mark.parametrize(
    ("device", "own", "there", "reserved"),
    [
        ("auto", 0, 0, 0),
        ("auto", 0, 8, 2),
        ("auto", 0.5, 8, 0.5),
        ("cuda:0", 0, 0, 2),  # which is refused by name, instead of computing on CPUs
        ("cpu", 0, 8, 0),
        (None, 0, 8, 0),
        (None, 1, 8, 1),
    ],
)
def test_a_model_takes_gpus_where_it_may_and_there_are_any(monkeypatch, device, own, there, reserved):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": float(there)})
    found = Stage(SlowSampler, Resources(actors=3, gpus=own), device, spread=2)
    assert found.gpus == reserved
    assert found.reserved == [Reserved(found.resources.cpus, reserved)] * 3


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.just(3)), elements=st.floats()))
def test_rows_that_are_no_probabilities_are_unclassified(judged):
    rows = sound(judged)
    for before, after in zip(judged, rows, strict=True):
        kept = np.array_equal(before, after)
        assert kept or after.tolist() == [0, 0, 1]
        assert (after >= 0).all()
        assert after.sum() == pytest.approx(1)
    assert np.array_equal(sound(rows), rows)


def test_both_stages_are_busy_at_the_same_time(ray_cluster):
    arrivals = []
    drawn = []
    for found in stages.draw(PARTS, BLOCKS, stage(SlowSampler), stage(SlowClassifier)):
        arrivals.append(time.monotonic())
        drawn.append(found)
    assert sorted(found.block for found in drawn) == sorted(PARTS.blocks)
    assert all(found.tokens == 4 and found.generating >= SECONDS <= found.classifying for found in drawn)
    one_after_the_other = (len(PARTS.blocks) - 1) * 2 * SECONDS
    assert arrivals[-1] - arrivals[0] < 0.8 * one_after_the_other


@pytest.mark.parametrize(
    ("judged_on", "users_own", "watches"), [(None, None, True), ("cpu", None, False), (None, "7", False)]
)
def test_threads_watch_for_work_where_one_model_has_the_cores_to_itself(
    ray_cluster, monkeypatch, judged_on, users_own, watches
):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if users_own:
        monkeypatch.setenv("GOMP_SPINCOUNT", users_own)
    generating = dataclasses.replace(stage(Waiting), device="cpu")
    classifying = dataclasses.replace(stage(SlowClassifier), device=judged_on)
    (drawn,) = stages.draw(PARTS, dict.fromkeys(PARTS.blocks[:1], ()), generating, classifying)
    assert (pl.read_parquet(drawn.part)["text"][0] == stages.SPINS["GOMP_SPINCOUNT"]) is watches


def test_stopped_early_the_actors_end(ray_cluster):
    import ray

    def idle():
        return ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]

    wait_until(idle, seconds=60, pause=0.2)  # the actors of the test before have ended
    drawn = stages.draw(PARTS, BLOCKS, stage(SlowSampler), stage(SlowClassifier))
    next(drawn)
    wait_until(lambda: not idle(), seconds=60, pause=0.2)
    drawn.close()
    wait_until(idle, seconds=60, pause=0.2)


def test_a_pipeline_on_a_cluster_of_ours_collects_nothing_about_its_use(ray_cluster):
    import ray.util

    list(stages.draw(PARTS, BLOCKS, stage(SlowSampler), stage(SlowClassifier)))
    helpers = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert "AutoscalingCoordinator" in helpers  # Ray Data's helpers are found by their names
    assert "DataUsageCollectionActor" not in helpers


def test_labelled_texts_come_back_in_their_places(ray_cluster):
    texts = {"law": ["a"] * 70, "code": ["b"] * 3}
    found = {(domain, start): rows.shape for domain, start, rows in stages.judge(texts, stage(SlowClassifier))}
    assert found == {("law", 0): (64, 3), ("law", 64): (6, 3), ("code", 0): (3, 3)}


def test_a_judge_that_gives_up_is_one_line(ray_cluster):
    with pytest.raises(DetectionError, match="sampling stopped: the judge has gone home: what is") as e:
        list(stages.judge({"law": ["a"]}, stage(GivesUp)))
    assert "\n" not in str(e.value)


def test_more_than_the_cluster_has_is_refused_before_anything_waits_for_it(ray_cluster):
    with pytest.raises(ConfigError, match=r"the Ray cluster has .* CPUs, and the stages reserve 1000\.5"):
        next(stages.draw(PARTS, BLOCKS, stage(SlowSampler, cpus=1000), stage(SlowClassifier)))
