"""A cluster that vtmix starts is closed to strangers and leaves nothing behind; a run is never put where it is lost."""

import fcntl
import os
import secrets
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vtmix import cluster
from vtmix.artifacts import RunFolder
from vtmix.cluster import Reserved
from vtmix.errors import ConfigError

UPLOADED = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """An empty folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cluster, "LONGEST_BASE", 1000)
    return tmp_path


def test_a_started_cluster_needs_a_token_that_only_its_owner_can_read(ray_cluster):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64


def test_a_started_cluster_refuses_jobs_without_a_token(ray_cluster):
    import ray

    agent = "http://127.0.0.1:52365/api/job_agent/jobs/"
    request = urllib.request.Request(agent, data=b'{"entrypoint": "true"}', method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 401
    assert ray.is_initialized()


def test_a_connection_within_a_connection_is_the_same(ray_cluster):
    import ray

    before = ray.get_runtime_context().get_job_id()
    with cluster.connect():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_work_that_reserves_more_than_there_is_is_refused(ray_cluster):
    cluster.require_resources([Reserved(1, 0)] * 4)
    cluster.require_resources([Reserved(0.1, 0)] * 40)
    with pytest.raises(ConfigError, match="has 4 CPUs, and the stages reserve 64: add nodes, or lower"):
        cluster.require_resources([Reserved(2, 0)] * 32)
    with pytest.raises(ConfigError, match="has 0 GPUs, and the stages reserve 1"):
        cluster.require_resources([Reserved(1, 1)])


TWO_NODES = """
import ray
from ray.cluster_utils import Cluster
from vtmix.cluster import Reserved, require_resources
from vtmix.errors import ConfigError

small = {"object_store_memory": 80 << 20, "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 4, **small})
try:
    more = nodes.add_node(num_cpus=1, num_gpus=4, **small)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    require_resources([Reserved(0.5, 4), Reserved(0.5, 4)])
    for actor in (Reserved(0.5, 8), Reserved(3, 0)):
        try:
            require_resources([actor])
        except ConfigError as error:
            print(error)
    nodes.remove_node(more)
    try:
        require_resources([Reserved(1, 4), Reserved(1, 4)])
    except ConfigError as error:
        print(error)
finally:
    ray.shutdown()
    nodes.shutdown()
"""


@pytest.mark.slow
def test_an_actor_that_no_node_holds_is_refused_though_the_cluster_has_as_much():
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES], env=own | token, capture_output=True, text=True, check=True
    )
    gpus, cpus, dead = done.stdout.splitlines()[-3:]
    there = "a node of the Ray cluster has 2 CPUs and 4 GPUs or 1 CPUs and 4 GPUs, and one actor reserves "
    assert gpus.startswith(f"{there}0.5 CPUs and 8 GPUs: add a larger node, or lower `cpus`, `gpus` or")
    assert cpus.startswith(f"{there}3 CPUs and 0 GPUs: add a larger node")
    assert "has 4 GPUs, and the stages reserve 8" in dead


def test_folders_of_dead_clusters_are_removed_and_those_of_living_ones_kept(temporary):
    dead = temporary / "vtmix-ray-dead"
    other = temporary / "other"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "token").write_text("x")
    with cluster._private_folder() as (files, token):
        assert not dead.exists()
        assert other.exists()
        assert files.is_dir()
        with cluster._private_folder() as (_, second):
            assert token.exists()
            assert second.exists()
        assert not second.parent.exists()
    assert list(temporary.iterdir()) == [other]


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with cluster._environment(RAY_AUTH_TOKEN=None, RAY_AUTH_MODE="token"):
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize(
    ("address", "mode", "reason"),
    [
        ("192.0.2.1:6379", "disabled", "without authentication"),
        ("http://127.0.0.1:8265", "token", "cannot join the Ray cluster of RAY_ADDRESS=http://127.0.0.1:8265"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(address, mode, reason):
    code = "from vtmix import cluster\nwith cluster.connect(): pass"
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": mode}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "vtmix.errors.ConfigError" in done.stderr
    assert reason in done.stderr


@pytest.mark.parametrize(("run", "pools"), [(UPLOADED / "run", None), (Path("/shared/run"), UPLOADED / "pool")])
def test_a_run_in_an_uploaded_copy_is_refused_with_the_command_to_use(monkeypatch, run, pools):
    monkeypatch.setattr(sys, "argv", ["jobs/reference.py"])
    with pytest.raises(ConfigError) as error:
        cluster.require_durable(RunFolder(run, pools))
    assert f"stands in the uploaded copy of this job's working directory ({UPLOADED})" in str(error.value)
    assert '-- python jobs/reference.py --config "$PWD/mixture.yaml"' in str(error.value)
    assert "-- python jobs/reference.py --run /shared/run" in str(error.value)


def test_a_link_into_an_uploaded_copy_is_seen_through(tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "run"
    copy.mkdir(parents=True)
    (tmp_path / "run").symlink_to(copy)
    with pytest.raises(ConfigError):
        cluster.require_durable(RunFolder(tmp_path / "run"))


@pytest.mark.parametrize("run", ["/home/me/run", "/data/working_dir_files/run", "/data/runtime_resources/run"])
def test_other_folders_are_fine(run):
    cluster.require_durable(RunFolder(Path(run)))


def test_a_locked_token_file_is_what_keeps_a_folder(temporary):
    folder = temporary / "vtmix-ray-alive"
    folder.mkdir()
    with (folder / "token").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cluster._sweep(temporary)
        assert folder.exists()
    cluster._sweep(temporary)
    assert not folder.exists()
