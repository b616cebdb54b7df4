"""Shards are Ray tasks: the same bytes as without Ray, whatever dies, with few of them under way at a time."""

import os
import signal
import threading
import time

import pytest
from handmade import run_of, tree
from test_detect import descendants, title

from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch
from vtmix.errors import DamageError

SIZES = {"samples_per_epoch": 4000, "mixture": {"shard_bytes": 8192}}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """What a compile without Ray makes."""
    config = run_of(tmp_path_factory.mktemp("golden"), **SIZES)
    compile_epoch(config, 1)
    return tree(run_folder(config).mixture(1))


def test_killed_workers_have_their_shards_written_again_to_the_same_bytes(tmp_path, golden, ray_cluster):
    config = run_of(tmp_path, **SIZES)
    staging = run_folder(config).mixture(1).parent
    killed = []

    def kill():
        while len(killed) < 3 and not run_folder(config).mixture(1).exists():
            settled = len(list(staging.glob(".staging-*/*.done")))
            titles = {pid: title(pid) for pid in descendants(os.getpid()) if pid not in killed}
            # Between two shards, a worker is idle for a moment.
            workers = sorted(pid for pid in titles if "lambda" in titles[pid] or titles[pid] == "ray::IDLE")
            if workers and settled > 10 * len(killed):
                os.kill(workers[-1], signal.SIGKILL)
                killed.append(workers[-1])
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    compile_epoch(config, 1, backend="ray")
    killer.join()
    assert killed
    assert tree(run_folder(config).mixture(1)) == golden


def test_what_stops_a_shard_on_a_worker_is_the_error_it_is_without_ray(tmp_path, ray_cluster):
    config = run_of(tmp_path, **SIZES)
    compile_epoch(config, 1)
    os.truncate(run_folder(config).pool("law") / "part-00001.arrow", 100)
    run_folder(config).mixture(1).rename(tmp_path / "away")
    with pytest.raises(DamageError, match="has 100 bytes, pool"):
        compile_epoch(config, 1, backend="ray")
    assert not run_folder(config).mixture(1).exists()
