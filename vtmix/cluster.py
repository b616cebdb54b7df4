"""The Ray cluster a job runs on: the one RAY_ADDRESS names, else one started for this process and ended with it.

A cluster started here needs a token of everyone who talks to it, has no dashboard, reports to nobody, and keeps its
files in a private temporary folder. Its ports are open on every interface all the same: the token is the defence.
"""

import fcntl
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from vtmix.artifacts import RunFolder
from vtmix.distribute import cores
from vtmix.errors import ConfigError
from vtmix.settings import Resources

PREFIX = "vtmix-ray-"
UPLOADED = ("runtime_resources", "working_dir_files")
LONGEST_BASE = 16  # a unix socket's path holds 107 bytes, of which Ray and the folders here take 91
LOOPBACK = ("127.0.0.1", "localhost", "::1", "auto", "local")


class Reserved(NamedTuple):
    """What one actor reserves, or one node has."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


# Ray reads a process's token once and keeps it, so every cluster this process starts has to have the same one.
_TOKEN = secrets.token_hex(32)


@contextmanager
def connect(cpus: float = 0) -> Iterator[None]:
    """Connects this process to its cluster, unless it is connected already; leaves it, or ends it, afterwards.

    A cluster started here offers this machine's cores, or `cpus` of them where those are more: work that reserves more
    than there is would wait for ever. Raises ConfigError when the cluster of RAY_ADDRESS cannot be joined.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        yield
    elif address == "local":
        with _started(cpus):
            yield
    else:
        with _joined(address):
            yield


def require_durable(run: RunFolder) -> None:
    """Raises ConfigError when a run stands in a job's uploaded working directory, which is lost after the job."""
    for path in (run.path, run.pools):
        copy = _uploaded_copy(path)
        if copy is not None:
            script = sys.argv[0] or "jobs/detect.py"
            raise ConfigError(
                f"{path} stands in the uploaded copy of this job's working directory ({copy}), which Ray deletes: "
                "its results would be lost, so nothing was started. Name the configuration by its absolute path, so "
                "that paths in it refer to your folder:\n"
                f'  ray job submit --working-dir . -- python {script} --config "$PWD/mixture.yaml"\n'
                "or, where the cluster does not see your folder, a run folder on storage that it shares:\n"
                f"  ray job submit --working-dir . -- python {script} --run /shared/run"
            )


def gpus_for(resources: Resources, device: str | None, spread: int = 1) -> float:
    """GPUs for whoever computes with a model on a device (None: with none), which is spread over so many of them.

    As set, else what the model takes where there are GPUs; needs a connected cluster.
    """
    import ray

    if resources.gpus or device is None:
        return resources.gpus
    there = device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    return spread if there or device.startswith("cuda") else 0


def require_resources(actors: Sequence[Reserved]) -> None:
    """Raises ConfigError when the connected cluster cannot hold these actors, which would wait for ever.

    It has to have what all of them reserve, and for each a node that has what that one reserves.
    """
    import ray

    found = ray.cluster_resources()
    for name, needed in zip(("CPU", "GPU"), map(math.fsum, zip(*actors, strict=True)), strict=True):
        if needed > found.get(name, 0):
            raise ConfigError(
                f"the Ray cluster has {found.get(name, 0):g} {name}s, and the stages reserve {needed:g}: "
                "add nodes, or lower `actors`, `cpus` or `gpus` of the stages in mixture.yaml"
            )
    nodes = [Reserved(has.get("CPU", 0), has.get("GPU", 0)) for has in _living()]
    for actor in actors:
        if not any(actor.cpus <= node.cpus and actor.gpus <= node.gpus for node in nodes):
            there = " or ".join(dict.fromkeys(map(str, sorted(nodes, reverse=True))))
            raise ConfigError(
                f"a node of the Ray cluster has {there}, and one actor reserves {actor}: add a larger node, or lower "
                "`cpus`, `gpus` or `tensor_parallel` of the stages in mixture.yaml"
            )


def _living() -> list[dict[str, float]]:
    """What each living node of the connected cluster has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _uploaded_copy(path: Path) -> Path | None:
    """The uploaded working directory that holds a path, if one does."""
    parts = path.resolve().parts
    for place in range(len(parts) - 1):
        if parts[place : place + 2] == UPLOADED:
            return Path(*parts[: place + 3])
    return None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    host = urlsplit(address if "://" in address else f"ray://{address}").hostname
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" and host not in LOOPBACK:
        raise ConfigError(
            f"RAY_ADDRESS={address} is to be joined without authentication (RAY_AUTH_MODE=disabled): whoever reaches "
            "such a cluster runs code on it: start it and its jobs with RAY_AUTH_MODE=token"
        )
    try:
        with _quiet():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot join the Ray cluster of RAY_ADDRESS={address}: {reason}: correct it, or unset it to work on this "
            "machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started(cpus: float) -> Iterator[None]:
    import ray

    # Ray Data asks whether it may report when a pipeline starts, and collects in a process of its own if so.
    for_its_life = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    with _private_folder() as (files, token), _environment(RAY_AUTH_TOKEN_PATH=str(token), **for_its_life):
        try:
            # Ray's workers would give way to every other process (niceness 15), though they do the work waited for.
            with _quiet(), _environment(RAY_AUTH_TOKEN=None, RAY_worker_niceness="0"):
                # Ray reads its environment when it is imported, which may have been before it was set.
                ray._raylet.Config.initialize("")
                ray.init(
                    address="local",
                    num_cpus=max(cores(), math.ceil(cpus)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(files),
                )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray's core from writing to the terminal, of which the first thing would be that it will not."""
    with _environment(RAY_BACKEND_LOG_LEVEL="fatal"), Path(os.devnull).open("w") as nowhere:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


@contextmanager
def _private_folder() -> Iterator[tuple[Path, Path]]:
    """A temporary folder for a cluster's files, and the token file (mode 0600) beside it, in a folder of mode 0700.

    The token file is locked while its cluster lives; folders whose owner was killed are found by that, and removed.
    """
    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_BASE else "/tmp"  # noqa: S108
    _sweep(Path(base))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        (folder / "ray").mkdir()  # Ray opens its own folder to everyone; the one around it stays private
        new = folder / "token.new"
        with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(_TOKEN)
            file.flush()
            yield folder / "ray", new.rename(folder / "token")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(base: Path) -> None:
    for token in base.glob(f"{PREFIX}*/token"):
        try:
            with token.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        shutil.rmtree(token.parent, ignore_errors=True)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Sets environment variables (None: unsets them), and restores them."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
