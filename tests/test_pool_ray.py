"""Pools built on Ray are, byte for byte, those built here, whatever dies on the way."""

import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from handmade import tree
from test_pool import built, folder_of

from vtmix import pooling, reduce, sources
from vtmix.config import load
from vtmix.errors import ConfigError
from vtmix.parts import encode_part
from vtmix.reduce import reduce_range

ROOT = Path(__file__).resolve().parent.parent
DYING = {"encoded/000002.arrow", "reduced/train-000001.arrow"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(reduce, "PART_BYTES", 8000)
    monkeypatch.setattr(sources, "PART_BYTES", 3000)


@pytest.fixture
def dying(monkeypatch, ray_cluster):
    """Workers that die once each at two moments. They know the functions of this file, though they cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with monkeypatch.context() as patch:
        patch.setattr(pooling, "encode_part", encode_and_die)
        patch.setattr(pooling, "reduce_range", reduce_and_die)
        yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def die_before_naming(out: Path) -> None:
    """Ends this process by SIGKILL when it has written `out` under its temporary name: on the first attempt alone."""
    name = f"{out.parent.name}/{out.name}"
    pools = out.parents[2]
    died = pools.parent / f"{out.parent.name}-{out.name}.died"
    if name in DYING and out.parents[1].name.startswith(".staging-law.") and not died.exists():
        died.touch()

        def hook(event, args):
            if event == "os.rename" and str(args[1]) == str(out):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def encode_and_die(task):
    die_before_naming(task.out)
    return encode_part(task)


def reduce_and_die(task):
    die_before_naming(task.out)
    return reduce_range(task)


@pytest.fixture
def golden(project, tmp_path, small):
    return built(project(tmp_path / "here"))[0]


def test_workers_that_are_killed_while_they_encode_and_reduce_change_nothing(project, tmp_path, golden, dying):
    config, _ = built(project(tmp_path / "there"), backend="ray", workers=1)
    assert len(list((tmp_path / "there" / "run").glob("*.died"))) == len(DYING)
    assert tree(folder_of(config)) == tree(folder_of(golden))
    assert sorted(path.name for path in folder_of(config).iterdir()) == [".pool.lock", *sorted(config.domains)]


def test_the_job_commits_the_bytes_that_vtmix_pool_commits(project, tmp_path, golden, monkeypatch, capsys, ray_cluster):
    path = project(tmp_path / "there")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "argv", ["jobs/pool.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "jobs" / "pool.py"), run_name="__main__")
    assert tree(folder_of(load(path))) == tree(folder_of(golden))
    assert capsys.readouterr().out.splitlines()[-1] == f"committed {folder_of(load(path))}"


def test_a_pool_that_would_be_lost_with_its_job_is_refused(project, tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    path = project(copy)
    with pytest.raises(ConfigError, match="stands in the uploaded copy of this job's working directory"):
        built(path, backend="ray")
    assert not folder_of(load(path)).exists()
