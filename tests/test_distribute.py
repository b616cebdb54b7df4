"""What is distributed comes back as it is done, whoever dies; an error comes back as itself, and ends the rest."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from vtmix import distribute
from vtmix.errors import RecordError


def slept(item: tuple[float, Path]) -> float:
    seconds, folder = item
    (folder / f"begun-{seconds}").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)  # Ray cancels between two instructions
    (folder / f"done-{seconds}").touch()
    return seconds


def refused(item: tuple[float, Path]) -> float:
    if item[0] < 0:
        raise RecordError("law.jsonl:1: no record")
    return slept(item)


def last(item: tuple[float, Path]) -> float:
    """The longest sleep ends when the others have come back."""
    seconds, folder = item
    end = time.monotonic() + seconds
    while seconds == 60 and time.monotonic() < end and not (folder / "others-came").exists():
        time.sleep(0.01)
    return seconds if seconds == 60 else slept(item)


def killed_once(folder: Path) -> int:
    try:
        (folder / "begun").touch(exist_ok=False)
    except FileExistsError:
        return os.getpid()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.fixture
def ray_workers(ray_cluster):
    """Workers that know the functions of this file, though they cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_is_raised_as_it_is_and_what_was_not_started_is_not(tmp_path):
    items = iter([(-1, tmp_path), (0.1, tmp_path), (0.2, tmp_path), (0.3, tmp_path)])
    with pytest.raises(RecordError, match="no record"):
        list(distribute.run(refused, items, backend="threads", workers=1))
    assert len(list(items)) == 2
    assert "begun-0.2" not in names(tmp_path)


def test_on_ray_results_come_as_they_are_done(tmp_path, ray_workers):
    items = [(60, tmp_path), (0.1, tmp_path), (0.2, tmp_path), (0.3, tmp_path)]
    results = distribute.run(last, items, backend="ray", workers=1)
    assert [next(results) for _ in range(3)] == [0.1, 0.2, 0.3]
    (tmp_path / "others-came").touch()
    assert list(results) == [60]


def test_on_ray_an_error_is_raised_as_it_is_and_what_is_under_way_is_cancelled(tmp_path, ray_workers):
    items = iter([(100, tmp_path), (-1, tmp_path), (0.1, tmp_path)])
    begun = time.monotonic()
    with pytest.raises(RecordError, match="no record") as error:
        list(distribute.run(refused, items, backend="ray", workers=1))
    assert type(error.value) is RecordError
    assert time.monotonic() - begun < 60
    assert len(list(items)) == 1
    assert not list(tmp_path.glob("done-*"))


def test_on_ray_the_task_of_a_killed_worker_is_done_again(tmp_path, ray_workers):
    (pid,) = distribute.run(killed_once, [tmp_path], backend="ray")
    assert pid > 0
    assert names(tmp_path) == ["begun"]
