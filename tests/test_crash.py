"""Whatever kills a compile, and whenever, an epoch is absent or whole, and the next compile makes it whole.

Method: children forked from a process that has vtmix imported are ended at the k-th file-system event for every k, at
random moments, by failing writes and by a full disk; forking.py. SIGKILL tests the death of processes, not the loss of
power: that files are flushed before they are named is by design, and not proven here.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forking import Forks
from handmade import run_of, tree, write_weights

from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch
from vtmix.config import load
from vtmix.verify import require_intact

RANDOM_KILLS = 100


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


class Run:
    """A run with epoch 1 compiled, the bytes its epoch 2 must have, and epoch 2 to be compiled again and again."""

    def __init__(self, folder, **settings):
        self.config = folder / "mixture.yaml"
        config = run_of(folder, **settings)
        write_weights(config, 2, {"law": 0.2, "medicine": 0.3, "code": 0.5})
        self.run = run_folder(config)
        compile_epoch(config, 1)
        self.first = tree(self.run.mixture(1))
        compile_epoch(config, 2)
        self.golden = tree(self.run.mixture(2))
        self.plan = self.run.plan(2).read_bytes()
        self.reset()

    @property
    def mixture(self):
        return self.run.mixture(2)

    def reset(self):
        """Removes all that compiling epoch 2 makes."""
        for path in (self.mixture, *self.mixture.parent.glob(".staging-*")):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.run.plan(2).parent.glob("*epoch-0002*"):
            path.unlink()

    def check(self):
        """Epoch 2 is absent or whole, its plan too, and nothing else has changed; says whether it is whole."""
        found = tree(self.mixture)
        assert found in ({}, self.golden)
        assert not self.run.plan(2).exists() or self.run.plan(2).read_bytes() == self.plan
        assert tree(self.run.mixture(1)) == self.first
        assert self.visible() <= {"epoch-0001", "epoch-0002"}
        return bool(found)

    def visible(self):
        return {path.name for path in self.mixture.parent.iterdir() if not path.name.startswith(".")}

    def check_next(self, forks, **request):
        """The next compile needs no help, and leaves nothing behind but the epoch."""
        end = forks.compile(self.config, 2, **request)
        assert end.code == 0, end.output
        assert self.check()
        assert {path.name for path in self.mixture.parent.iterdir()} == {"epoch-0001", "epoch-0002"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three shards: few events, so that every one of them can be the last."""
    return Run(tmp_path_factory.mktemp("small"), samples_per_epoch=60, mixture={"shard_bytes": 8192})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A compile of a few tenths of a second, most of which writes shards."""
    return Run(tmp_path_factory.mktemp("large"), samples_per_epoch=8000, mixture={"shard_bytes": 1 << 18})


def test_ended_at_any_file_system_event_an_epoch_is_absent_or_whole(small, forks):
    small.reset()
    events = forks.compile(small.config, 2, workers=1).events
    outcomes = []
    for event in range(1, events + 1):
        small.reset()
        end = forks.compile(small.config, 2, workers=1, exit_at=event)
        assert end.code == 137, (event, end)
        outcomes.append(small.check())
        small.check_next(forks)
    assert events > 40
    # Published by one event near the end, and never taken back.
    assert outcomes == sorted(outcomes)
    assert 0 < outcomes.count(True) < 10
    small.reset()
    assert forks.compile(small.config, 2, workers=1, exit_at=events + 1).code == 0


def test_killed_at_random_moments_an_epoch_is_absent_or_whole(large, forks):
    def seconds():
        large.reset()
        return forks.compile(large.config, 2).seconds

    usual = sorted(seconds() for _ in range(5))[2]
    numbers = random.Random(2)
    killed = 0
    for trial in range(RANDOM_KILLS):
        large.reset()
        end = forks.compile(large.config, 2, kill_after=numbers.uniform(0, 1.3 * usual))
        killed += end.code == -signal.SIGKILL
        assert end.code in (0, -signal.SIGKILL), end.output
        whole = large.check()
        assert whole or end.code
        if trial % 2:
            large.check_next(forks, workers=1 + trial // 2 % 2)
    assert killed > RANDOM_KILLS / 2


def test_killed_again_and_again_a_compile_goes_on_from_the_shards_it_has(large, forks):
    large.reset()
    complete = {}
    kills = 0
    # Far enough to read the records of the shards that are complete and to write one or two more.
    while forks.compile(large.config, 2, workers=1, exit_at=29 + len(complete)).code and kills < 30:
        kills += 1
        for record in large.mixture.parent.glob(".staging-*/*.done"):
            shard = record.with_suffix("")
            assert complete.setdefault(shard.name, shard.stat().st_ino) == shard.stat().st_ino
    assert large.check()
    assert kills >= 3
    assert len(complete) >= 5
    assert {name: (large.mixture / name).stat().st_ino for name in complete} == complete


def interrupted_with_a_record(run, forks):
    """The record of a shard that a compile settled before it was ended."""
    for event in range(20, 60):
        run.reset()
        assert forks.compile(run.config, 2, workers=1, exit_at=event).code == 137
        for record in run.mixture.parent.glob(".staging-*/*.done"):
            return record
    raise AssertionError("no shard is ever settled before the end")


@pytest.mark.parametrize("damage", ["shard missing", "shard cut", "record cut"])
def test_a_staged_shard_is_taken_over_only_with_its_whole_record(small, forks, damage):
    """After a loss of power, of what was not flushed some may be missing."""
    record = interrupted_with_a_record(small, forks)
    if damage == "shard missing":
        record.with_suffix("").unlink()
    elif damage == "shard cut":
        os.truncate(record.with_suffix(""), 100)
    else:
        os.truncate(record, 20)
    small.check_next(forks)


def test_a_write_that_fails_is_one_error_and_publishes_nothing(small, forks):
    small.reset()
    writes = forks.compile(small.config, 2, workers=1, fail_at=0).events
    for write in range(1, writes + 1):
        small.reset()
        end = forks.compile(small.config, 2, workers=1, fail_at=write)
        assert end.code == 1, end.output
        assert "Traceback" not in end.output, end.output
        *_, error = end.output.splitlines()
        assert error.startswith(f"error: {small.run.path}/")
        assert error.endswith(": No space left on device")
        assert not small.check()
        assert not list(small.run.path.rglob("*.tmp"))
        small.check_next(forks)
    assert writes > 15


def test_a_file_that_cannot_grow_is_named_with_the_bytes_it_needed(large, forks):
    sizes = {name: (large.run.mixture(1) / name).stat().st_size for name in large.first}
    plan = large.run.plan(1).stat().st_size
    for largest, expected in {
        0: r"\.compile\.lock: cannot be locked",
        plan // 2: r"plan/epoch-0002\.json: cannot write \d,\d\d\d bytes",
        sizes["shard.00000.mds"] // 2: r"shard\.0000\d\.mds: cannot write [\d,]+ bytes",
    }.items():
        large.reset()
        end = forks.compile(large.config, 2, largest=largest)
        assert end.code == 1
        assert re.search(f"^error: {large.run.path}/.*{expected}: File too large\n$", end.output), end.output
        assert not large.check()
        large.check_next(forks)


FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
folder, config = Path(sys.argv[1]), sys.argv[2]
def size(option):
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder / "run"], check=True)
def compiled():
    done = subprocess.run([sys.executable, "-m", "vtmix.compile", "--config", config, "--epoch", "2"],
                          capture_output=True, text=True)
    print(done.returncode, done.stderr.splitlines()[-1] if done.returncode else "")
    visible = [path.name for path in (folder / "run" / "mixture").iterdir() if not path.name.startswith(".")]
    print(*sorted(visible))
shutil.copytree(folder / "run", folder / "kept", symlinks=True)
size("size=" + sys.argv[3])
shutil.copytree(folder / "kept", folder / "run", dirs_exist_ok=True)
compiled()
size("remount,size=64m")
compiled()
shutil.copytree(folder / "run", folder / "result")
"""


def test_a_full_disk_costs_nothing(large, tmp_path):
    large.reset()
    run = shutil.copytree(large.run.path, tmp_path / "run")
    config = shutil.copy(large.config, tmp_path / "mixture.yaml")
    used = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in run.rglob("*"))
    space = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", run], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs in a namespace of one's own is not allowed here")
    command = [*space, sys.executable, "-c", FULL_DISK, str(tmp_path), str(config), f"{used + 700}k"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    full, then, free, finally_ = done.stdout.splitlines()
    assert full.startswith(f"1 error: {tmp_path}/run/mixture/.staging-epoch-0002."), full
    assert full.endswith(" bytes: No space left on device"), full
    assert then == "epoch-0001"
    assert free == "0 "
    assert finally_ == "epoch-0001 epoch-0002"
    assert tree(tmp_path / "result" / "mixture" / "epoch-0002") == large.golden
    assert tree(tmp_path / "result" / "mixture" / "epoch-0001") == large.first


def test_of_eight_that_race_one_publishes_and_the_others_name_it(large, forks):
    for _ in range(3):
        large.reset()
        ends = forks.race(large.config, 2, 8)
        (winner,) = [end for end in ends if "committed: " in end.output]
        assert winner.code == 0
        for end in ends:
            if end is not winner and not end.output.startswith("up to date: "):
                assert end.code == 1
                assert end.output == (
                    f"error: {large.run.path}: process {winner.pid} holds the compile lock: "
                    "wait for it to end, or end it\n"
                )
        assert large.check()


HOLDER = """
import sys
from pathlib import Path
from vtmix import commit
with commit.lock(Path(sys.argv[1]), "compile"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_holder_leaves_no_stale_lock(small, forks):
    small.reset()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(small.run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        for end in forks.race(small.config, 2, 2):
            assert (end.code, f"process {holder.pid} holds the compile lock" in end.output) == (1, True)
        assert not small.check()
        holder.kill()
    small.check_next(forks)


def test_other_work_on_an_epoch_replaces_what_an_interrupted_compile_left(small, forks, tmp_path):
    shutil.copytree(small.config.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "mixture.yaml"
    run = run_folder(load(config))
    staging = run.mixture(3).parent / ".staging-epoch-0002.0123456789abcdef"
    staging.mkdir()
    (staging / "shard.00000.mds").write_bytes(b"of other weights")
    shutil.rmtree(run.mixture(2), ignore_errors=True)
    assert forks.compile(config, 2).code == 0
    assert not staging.exists()
    assert tree(run.mixture(2)) == small.golden
    require_intact(run.mixture(2))
    assert Path(config).exists()
