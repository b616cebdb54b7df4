"""Jobs on a real cluster, by `ray job submit`, with token authentication on."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from handmade import tree
from test_detect import ROOT, World, content_of, descendants, golden, wait_until, world  # noqa: F401

from vtmix import pooling
from vtmix.artifacts import Weights, run_folder
from vtmix.compile import compile_epoch
from vtmix.config import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent


class Head:
    """A cluster started with `ray start --head`, that takes jobs from holders of its token.

    It has two CPUs: on as few, no job with default stages waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        port, dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [
            *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={folder / 'ray'}"),
        ]
        self.log = (folder / "start.log").open("w")
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)

    def ready(self) -> bool:
        """Whether jobs are taken; refused requests count, since they carry no token here."""
        assert self.process.poll() is None, Path(self.log.name).read_text()
        try:
            urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=5)
        except urllib.error.HTTPError as error:
            return error.code in (401, 403)
        except OSError:
            return False
        raise AssertionError("jobs are listed without a token")

    def submit(self, working_dir: Path, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", "job", "submit", "--address", self.address, "--working-dir", working_dir, "--", *command],
            check=False,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> None:
        """Kills what was started, and nothing else."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="vtmix-head-", dir="/tmp"))  # a unix socket's path is short
    started = Head(folder)
    try:
        wait_until(started.ready, pause=0.2)
        yield started
    finally:
        started.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def project_folder(world: World) -> Path:  # noqa: F811
    """A folder as a user submits it: the jobs, mixture.yaml with relative paths, data and pool."""
    shutil.copytree(ROOT / "jobs", world.folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    world.write("submitted").rename(world.folder / "mixture.yaml")
    return world.folder


def test_a_job_that_would_lose_its_results_says_so_before_it_starts(head, project_folder):
    done = head.submit(project_folder, "python", "jobs/detect.py")
    assert done.returncode != 0
    assert "error: " in done.stdout
    assert "stands in the uploaded copy of this job's working directory" in done.stdout
    assert 'ray job submit --working-dir . -- python jobs/detect.py --config "$PWD/mixture.yaml"' in done.stdout
    assert "Traceback" not in done.stdout
    assert not (project_folder / "submitted" / "detection").exists()


def test_a_job_given_an_absolute_path_commits_in_the_submitters_folder(head, project_folder, golden):  # noqa: F811
    done = head.submit(project_folder, "python", "jobs/detect.py", "--config", str(project_folder / "mixture.yaml"))
    assert done.returncode == 0, done.stdout
    folder = project_folder / "submitted" / "detection"
    assert f"committed {folder / 'detection.json'}: 408 samples" in done.stdout
    assert content_of(folder) == content_of(golden)


def test_a_job_given_a_relative_path_commits_where_absolute_paths_in_it_say(head, project_folder, golden):  # noqa: F811
    run, pools = project_folder / "elsewhere-by-job", project_folder / "pool"
    shutil.copytree(golden, run / "detection")
    (run / "detection" / "detection.json").unlink()  # its parts are drawn: the job has the report left to do
    content = yaml.safe_load((project_folder / "mixture.yaml").read_text())
    absolute = content | {"run": str(run), "pool": content["pool"] | {"folder": str(pools)}}
    (project_folder / "absolute.yaml").write_text(yaml.safe_dump(absolute, sort_keys=False))
    done = head.submit(project_folder, "python", "jobs/detect.py", "--config", "absolute.yaml")
    assert done.returncode == 0, done.stdout
    assert f"committed {run / 'detection' / 'detection.json'}: 408 samples" in done.stdout
    assert content_of(run / "detection") == content_of(golden)


def test_a_compile_job_writes_the_mixture_that_the_command_does(head, project_folder):
    config = load(project_folder / "mixture.yaml")
    shares = dict.fromkeys(config.domains, 1 / len(config.domains))
    Weights(epoch=1, weights=shares).publish(run_folder(config).weights(1))
    command = ["python", "jobs/compile.py", "--epoch", "1", "--config", str(project_folder / "mixture.yaml")]
    done = head.submit(project_folder, *command)
    assert done.returncode == 0, done.stdout
    assert f"committed: {run_folder(config).mixture(1)}" in done.stdout
    found = tree(run_folder(config).mixture(1))
    run_folder(config).mixture(1).rename(project_folder / "by-the-job")
    compile_epoch(config, 1)
    assert tree(run_folder(config).mixture(1)) == found


def test_a_pool_job_writes_the_pools_that_the_command_does(head, project_folder, project, tmp_path):
    path, same = project(tmp_path / "there"), project(tmp_path / "here")
    done = head.submit(project_folder, "python", "jobs/pool.py", "--config", str(path))
    assert done.returncode == 0, done.stdout
    assert f"committed {run_folder(load(path)).pools}" in done.stdout
    pooling.build(load(same))
    for domain in load(path).domains:
        assert tree(run_folder(load(path)).pool(domain)) == tree(run_folder(load(same)).pool(domain))
