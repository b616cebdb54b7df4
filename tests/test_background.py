"""Ray's bookkeepers and a quiet pipeline's loop give way to the stages; what others wait for does not."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from test_detect import wait_until

from vtmix import background, stages
from vtmix.samples import Parts, Sample, blocks_of
from vtmix.settings import Resources
from vtmix.stages import Stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="SCHED_IDLE is Linux's"),
]


class Waits:
    """A generator that computes nothing for a while."""

    def __call__(self, seeds, openings):
        time.sleep(30)
        return [Sample("text", (1, 2), "stop") for _ in seeds]


class Halves:
    def __call__(self, texts):
        return np.tile([0.5, 0.5, 0.0], (len(texts), 1))


def policies(process: psutil.Process) -> set[int]:
    """The scheduling policies of a process's threads; none where it has ended meanwhile."""
    with suppress(psutil.Error, ProcessLookupError):
        return {os.sched_getscheduler(thread.id) for thread in process.threads()}
    return set()


def named(*names: str) -> list[psutil.Process]:
    """This process's descendants with such a name in their command lines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if any(name in part for name in names for part in process.cmdline()):
                found.append(process)
    return found


def test_while_a_pipeline_runs_what_keeps_books_gives_way_and_nothing_else(ray_cluster, tmp_path):
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    parts = Parts(tmp_path, ("law", "code"), blocks_of(1, 4, 4), 1, {})
    generating, classifying = (Stage(make, Resources(actors=1, cpus=0.5)) for make in (Waits, Halves))
    drawn = []
    pipeline = threading.Thread(
        target=lambda: drawn.extend(stages.draw(parts, dict.fromkeys(parts.blocks, ()), generating, classifying))
    )
    pipeline.start()
    workers = ("ray::MapWorker(Map(_Generate))", "ray::MapWorker(Map(_Classify))")
    wait_until(lambda: all(map(named, workers)), seconds=60, pause=0.2)
    bookkeepers = ("ray::_StatsActor", "ray::ActorLocationTracker", "ray::_AutoscalingCoordinatorActor")
    wait_until(
        lambda: all(any(policies(found) == {os.SCHED_IDLE} for found in named(name)) for name in bookkeepers),
        seconds=60,
        pause=0.2,
    )
    for name in (*workers, "raylet/raylet", "gcs/gcs_server"):
        assert {policy for found in named(name) for policy in policies(found)} == {os.SCHED_OTHER}
    loops = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]
    wait_until(lambda: os.SCHED_IDLE in map(os.sched_getscheduler, loops), seconds=30, pause=0.2)
    assert os.sched_getscheduler(threading.main_thread().native_id) == os.SCHED_OTHER
    pipeline.join()
    assert [found.block for found in drawn] == list(parts.blocks)


@contextmanager
def posing_as(name: str) -> Iterator[psutil.Process]:
    """A process of this one's that has a bookkeeper's name."""
    with subprocess.Popen([name, "60"], executable="/bin/sleep") as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def test_a_bookkeeper_of_another_process_is_left_as_it_is():
    with posing_as("ray::_StatsActor") as process:
        script = "from vtmix.background import idle_bookkeepers; idle_bookkeepers()"
        subprocess.run([sys.executable, "-c", script], check=True)
        assert policies(process) == {os.SCHED_OTHER}
        background.idle_bookkeepers()
        assert policies(process) == {os.SCHED_IDLE}


def test_where_a_sandbox_forbids_it_nothing_gives_way_and_nothing_stops(monkeypatch):
    def forbidden(*arguments):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with posing_as("ray::_StatsActor") as process:
        background.idle_bookkeepers()
        assert policies(process) == {os.SCHED_OTHER}


def looped(seconds_per_step: float, steps: int) -> tuple[float, int]:
    """A loop of so many steps, in a thread as it would be; gives the seconds of its last pause, and its policy."""
    context = SimpleNamespace(custom_execution_callback_classes=[])
    background.give_way(context)
    (callback,) = context.custom_execution_callback_classes
    found = []

    def loop():
        called = callback()
        for _ in range(steps):
            time.sleep(seconds_per_step)
            start = time.monotonic()
            called.on_execution_step(None)
            found.append(time.monotonic() - start)
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    return found[-2], found[-1]


def test_a_loop_that_finishes_something_in_every_step_never_pauses():
    pause, policy = looped(0.01, 40)
    assert pause < background.LONGER
    assert policy == os.SCHED_OTHER


def test_a_loop_in_which_nothing_is_finished_pauses_longer_and_gives_way():
    pause, policy = looped(background.STEP, 22)
    assert pause >= background.LONGEST
    assert policy == os.SCHED_IDLE
