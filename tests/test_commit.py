"""Files are published all or nothing, never twice, by one process at a time, and an error names the place."""

import fcntl
import os
import threading
import time

import pytest

from vtmix import commit
from vtmix.errors import ConflictError, LockedError, VtmixError


def test_a_lock_is_free_again_after_an_error_and_names_no_former_holder(tmp_path):
    with pytest.raises(RuntimeError), commit.lock(tmp_path, "work"):
        raise RuntimeError
    assert (tmp_path / ".work.lock").read_bytes() == b""
    with commit.lock(tmp_path, "work"), pytest.raises(LockedError, match=f"process {os.getpid()} holds the work lock"):
        commit.lock(tmp_path, "work").__enter__()
    with commit.lock(tmp_path, "work"), commit.lock(tmp_path, "other"):
        assert (tmp_path / ".work.lock").read_text() == str(os.getpid())


def test_a_lock_whose_holder_is_just_going_is_waited_for(tmp_path):
    with (tmp_path / ".work.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        start = time.monotonic()
        with commit.lock(tmp_path, "work"):
            assert time.monotonic() - start >= 0.15


def test_a_file_is_published_once(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    assert commit.publish_file(path, b"one")
    before = path.stat().st_ino
    assert not commit.publish_file(path, b"one")
    with pytest.raises(ConflictError, match=r"file\.json: exists with other content"):
        commit.publish_file(path, b"two")
    assert (path.read_bytes(), path.stat().st_ino) == (b"one", before)
    assert list(path.parent.iterdir()) == [path]


def test_published_files_heed_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        commit.publish_file(tmp_path / "one", b"")
        commit.write_staged(tmp_path / "two", b"")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "two")] == [0o640, 0o640]


def test_a_published_folder_is_never_replaced(tmp_path):
    final = tmp_path / "law"
    for content in (b"one", b"two"):
        staging = commit.staging_folder(final, "ab" * 32)
        commit.write_staged(staging / "file", content)
        if content == b"one":
            commit.publish_folder(staging, final)
    with pytest.raises(ConflictError, match="law: exists, and committed folders never change"):
        commit.publish_folder(staging, final)
    assert (final / "file").read_bytes() == b"one"


def test_staging_is_resumed_by_equal_work_only_and_others_work_is_left_alone(tmp_path):
    names = ["law", "law-eu", "law_2"]
    folders = {name: commit.staging_folder(tmp_path / name, "ab" * 32) for name in names}
    for folder in folders.values():
        (folder / "kept").touch()
    assert commit.staging_folder(tmp_path / "law", "ab" * 32) == folders["law"]
    assert (folders["law"] / "kept").exists()
    commit.staging_folder(tmp_path / "law", "cd" * 32)
    assert [folder.exists() for folder in folders.values()] == [False, True, True]


def test_an_error_while_a_file_is_staged_leaves_none_of_it(tmp_path):
    def write():
        with commit.staged(tmp_path / "file", 9) as file:
            file.write(b"some")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_of_two_attempts_at_one_file_each_is_whole_and_the_last_counts(tmp_path):
    path = tmp_path / "file"
    with commit.staged(path, 9) as first:
        first.write(b"first ")
        commit.write_staged(path, b"second")
        assert path.read_bytes() == b"second"
        first.write(b"one")
    assert path.read_bytes() == b"first one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_attempt_still_under_way_is_no_part_of_what_is_published(tmp_path):
    final = tmp_path / "law"
    staging = commit.staging_folder(final, "ab" * 32)
    commit.write_staged(staging / "file", b"whole")
    commit.make_folder(staging / "eval")
    late = commit.staged(staging / "eval" / "file", 9)
    late.__enter__().write(b"some")
    commit.publish_folder(staging, final)
    assert [path for path in final.rglob("*") if path.is_file()] == [final / "file"]
    with pytest.raises(VtmixError, match="eval/file: cannot write 9 bytes: No such file"):
        late.__exit__(None, None, None)
    assert list((final / "eval").iterdir()) == []


def test_a_place_that_is_no_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    for call in (
        lambda: commit.publish_file(tmp_path / "file" / "one", b""),
        lambda: commit.staging_folder(tmp_path / "file" / "one", "ab"),
        lambda: commit.lock(tmp_path / "file", "work").__enter__(),
        lambda: commit.write_staged(tmp_path / "none" / "one", b""),
        lambda: commit.publish_folder(tmp_path / "none", tmp_path / "one"),
    ):
        with pytest.raises(VtmixError, match=str(tmp_path)):
            call()
