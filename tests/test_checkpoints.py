"""A checkpoint exists completely or not at all, and training never starts afresh over what is there.

Processes are killed at every file operation of a save; files are cut, changed, renamed and taken away.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from vtmix import checkpoints
from vtmix.errors import ConflictError, DamageError


def save(folder: Path, step: int, content: bytes = b"", keep: int = 2, mixture: str = "m1") -> Path:
    file = checkpoints.staged(folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content or b"state after %d" % step)
    return checkpoints.publish(file, step=step, epoch=1 + step // 10, mixture=mixture, keep=keep)


def silent(text: str) -> None:
    raise AssertionError(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_newest_checkpoint_is_found_with_what_it_belongs_to(tmp_path):
    assert checkpoints.newest(tmp_path / "none", silent) is None
    for step in (2, 4, 12):
        save(tmp_path, step)
    path, found = checkpoints.newest(tmp_path, silent)
    assert path.read_bytes() == b"state after 12"
    assert (found.step, found.epoch, found.mixture) == (12, 2, "m1")


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    assert checkpoints.newest(tmp_path, silent)[1].step == 100_000_000


def run_until(folder: Path, crash_at: int) -> bool:
    """Saves step 4 in a child that dies at its crash_at-th file operation; True when it lived."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"):
                seen += 1
                if seen == crash_at:
                    os._exit(137)

        sys.addaudithook(count)
        save(folder, 4, keep=1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killed_at_any_file_operation_of_a_save_an_intact_checkpoint_is_left(tmp_path):
    crash_at, lived = 0, False
    steps = []
    while not lived:
        crash_at += 1
        folder = tmp_path / str(crash_at)
        save(folder, 2)
        lived = run_until(folder, crash_at)
        path, found = checkpoints.newest(folder, silent)
        steps.append(found.step)
        assert path.read_bytes() == b"state after %d" % found.step
        assert not list(folder.glob(".*"))
        if found.step == 2:  # and the save succeeds when it is tried again
            save(folder, 4, keep=1)
            assert checkpoints.newest(folder, silent)[1].step == 4
    assert crash_at > 8
    assert steps == sorted(steps)
    assert {2, 4} == set(steps)


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "no state", "no marker", "torn marker", "swapped"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one_and_says_so(tmp_path, damage):
    save(tmp_path, 2)
    last = save(tmp_path, 4)
    harm(last, damage)
    said = []
    path, found = checkpoints.newest(tmp_path, said.append)
    assert (found.step, path.read_bytes()) == (2, b"state after 2")
    assert len(said) == 1
    assert "step-00000004" in said[0]
    assert "falling back to the checkpoint after step 2" in said[0]
    save(tmp_path, 4, b"another run of the same step")  # its place is free again
    assert checkpoints.newest(tmp_path, silent)[1].step == 4


def harm(checkpoint: Path, damage: str) -> None:
    state, marker = checkpoint / "state.pt", checkpoint / "checkpoint.json"
    content = state.read_bytes()
    match damage:
        case "cut":
            state.write_bytes(content[:-1])
        case "emptied":
            state.write_bytes(b"")
        case "flipped":
            state.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "no state":
            state.unlink()
        case "no marker":
            marker.unlink()
        case "torn marker":
            marker.write_bytes(marker.read_bytes()[:20])
        case "swapped":
            other = checkpoint.with_name("step-00000002")
            for name in ("state.pt", "checkpoint.json"):
                (checkpoint / name).write_bytes((other / name).read_bytes())


@pytest.mark.parametrize("damage", ["cut", "flipped", "no marker"])
def test_training_does_not_start_afresh_where_no_checkpoint_is_intact(tmp_path, damage):
    for step in (2, 4):
        harm(save(tmp_path, step), damage)
    before = tree(tmp_path)
    with pytest.raises(DamageError, match="does not start afresh") as caught:
        checkpoints.newest(tmp_path, silent)
    assert "step-00000002" in str(caught.value)
    assert "step-00000004" in str(caught.value)
    assert tree(tmp_path) == before


def test_training_does_not_start_afresh_beside_files_of_another_kind(tmp_path):
    (tmp_path / "ep1-ba6-rank0.pt").write_bytes(b"someone's")
    with pytest.raises(DamageError, match=r"ep1-ba6-rank0\.pt is no checkpoint"):
        checkpoints.newest(tmp_path, silent)


def test_a_checkpoint_of_another_mixture_is_refused_naming_both(tmp_path):
    save(tmp_path, 2, mixture="aaaa")
    _, found = checkpoints.newest(tmp_path, silent)
    checkpoints.require_mixture(found, "aaaa")
    with pytest.raises(ConflictError, match="digest was aaaa, the one in the run folder has bbbb"):
        checkpoints.require_mixture(found, "bbbb")


def test_a_marker_is_json_a_person_can_read(tmp_path):
    content = json.loads((save(tmp_path, 2, b"abc") / "checkpoint.json").read_text())
    assert content["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (content["step"], content["bytes"]) == (2, 3)
