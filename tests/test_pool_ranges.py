"""Cut into ranges of keys, a pool is what it is in one: the same samples in the same order, duplicates and leaks found
wherever they stand; and a worker needs memory for its range alone.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import records, write_jsonl
from handmade import samples, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pool import accounted, built, content, eval_ids, folder_of, identity, staging, stamps, train_ids, trained

from vtmix import mds, reduce, sources
from vtmix import pool as pools
from vtmix.config import load
from vtmix.errors import LeakError
from vtmix.leaks import CommittedPool
from vtmix.ranges import KEYS, KeyRange, key_ranges

RANGE = 2500
CUT = 2000


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """The project of conftest, built in one range: for tests that change nothing in it."""
    import conftest

    return built(conftest.project.__wrapped__(tmp_path_factory.mktemp("shared"), tiny_model)())


@pytest.fixture
def small_ranges(monkeypatch):
    """Pools are cut into many ranges, and sources into many parts."""
    monkeypatch.setattr(reduce, "PART_BYTES", RANGE)
    monkeypatch.setattr(sources, "PART_BYTES", CUT)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(10**3, 10**6))
def test_ranges_hold_every_key_once_and_are_as_few_as_may_be(size, most):
    ranges = key_ranges(size, most)
    assert len(ranges) * most >= size > (len(ranges) - 1) * most or not size
    edges = [-1, *(keys.last for keys in ranges)]
    assert [keys.first for keys in ranges] == [edge + 1 for edge in edges[:-1]]
    assert not ranges or edges[-1] == KEYS - 1


# The same pool


@pytest.mark.parametrize("cut", [300, 1 << 20])
def test_the_ranges_of_a_pool_do_not_depend_on_where_files_are_cut(project, tmp_path, monkeypatch, small_ranges, cut):
    config, manifests = built(project(tmp_path / "one"))
    assert all(len(manifest.parts) > 4 for manifest in manifests.values())
    monkeypatch.setattr(sources, "PART_BYTES", cut)
    other, _ = built(project(tmp_path / "other"))
    assert tree(folder_of(other, "law")) == tree(folder_of(config, "law"))
    assert content(other) == content(config)


def test_many_ranges_hold_what_one_holds_in_the_same_order(shared, project, small_ranges):
    config, manifests = built(project())
    for domain, manifest in manifests.items():
        assert train_ids(config, domain) == train_ids(shared[0], domain)
        same = {"eval/index.json", "eval/shard.00000.mds", "texts.parquet"}
        found, expected = tree(folder_of(config, domain)), tree(folder_of(shared[0], domain))
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
        assert manifest.model_copy(update={"parts": ()}) == shared[1][domain].model_copy(update={"parts": ()})


def test_the_parts_of_a_pool_add_up_to_it(project, small_ranges):
    config, manifests = built(project())
    for domain, manifest in manifests.items():
        for total, each in {
            "samples": "samples",
            "tokens": "tokens",
            "response_tokens": "response_tokens",
            "bytes": "sample_bytes",
        }.items():
            assert getattr(manifest, total) == sum(getattr(part, each) for part in manifest.parts)
        opened = pools.open_pool(folder_of(config, domain))
        first = list(opened.samples(0, manifest.parts[0].samples))
        assert manifest.parts[0].tokens == sum(len(sample["input_ids"]) for sample in first)
        assert manifest.parts[0].response_tokens == sum(int((sample["labels"] != -100).sum()) for sample in first)


def test_duplicates_are_dropped_wherever_their_copies_stand(shared, project, tmp_path, small_ranges):
    path = project()
    write_jsonl(tmp_path / "data" / "law.jsonl", records("law", 60) + records("law", 60)[::-1] + records("law", 10))
    config, manifests = built(path)
    assert (train_ids(config), eval_ids(config)) == (train_ids(shared[0]), eval_ids(shared[0]))
    assert manifests["law"].duplicates == 70
    assert accounted(manifests["law"])


# Leaks


def leaking(shared, project, tmp_path, **overrides):
    """A project in which law holds out 12 samples that medicine trains on, each of which medicine has twice."""
    path = project(domains={"law": {"train": "data/law.jsonl", "eval": "data/law-eval.jsonl"}}, **overrides)
    rows = records("medicine", 60)
    leaked = trained(shared, "medicine", 12)
    write_jsonl(tmp_path / "data" / "medicine.jsonl", rows + rows)
    write_jsonl(tmp_path / "data" / "law-eval.jsonl", records("law", 5, start=900) + [rows[n] for n in leaked])
    return path, leaked


@pytest.mark.parametrize("cut", [500, 4000])
def test_leaks_in_any_range_are_named_by_the_first_line_they_stand_on(
    shared, project, tmp_path, monkeypatch, small_ranges, cut
):
    monkeypatch.setattr(sources, "PART_BYTES", cut)
    path, leaked = leaking(shared, project, tmp_path)
    with pytest.raises(
        LeakError, match=r"^12 training samples also stand in an eval split, no pool was built"
    ) as error:
        built(path)
    assert sorted(str(error.value).splitlines()[1:]) == sorted(
        f"  data/medicine.jsonl:{line + 1}: sample {identity(records('medicine', 60)[line])} of 'medicine' also stands "
        "in the eval split of 'law'"
        for line in leaked
    )


def test_leaks_in_any_range_are_dropped_where_that_is_set(shared, project, tmp_path, small_ranges):
    path, leaked = leaking(shared, project, tmp_path, pool={"leak": "drop", "texts": 20})
    config, manifests = built(path)
    dropped = {identity(records("medicine", 60)[line]) for line in leaked}
    assert train_ids(config, "medicine") == [name for name in train_ids(shared[0], "medicine") if name not in dropped]
    assert manifests["medicine"].leaks_dropped == 12
    assert all(accounted(manifest) for manifest in manifests.values())
    said = {identity(row): f"{row['prompt']}\n{row['response']}" for row in records("medicine", 60)}
    texts = pools.texts(folder_of(config, "medicine"))
    assert texts == [said[name] for name in train_ids(config, "medicine")[:20]]


def test_leaks_beyond_the_listing_are_counted(project, tmp_path, small_ranges):
    path = project(domains={"law": {"train": "data/law.jsonl", "eval": "data/law-eval.jsonl"}})
    for name in ("law", "law-eval"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", records("law", 130))
    with pytest.raises(LeakError, match=r"^130 training samples also stand") as error:
        built(path)
    assert len(str(error.value).splitlines()) == 1 + 100 + 1
    assert str(error.value).endswith("\n  … and 30 more")


def test_committed_pools_of_many_parts_are_held_against_a_new_domain_in_both_directions(
    project, tmp_path, small_ranges
):
    path = project()
    config, _ = built(path)
    rows = {identity(row): row for row in records("law", 60)}
    learned, held_out = train_ids(config)[::5], eval_ids(config)[::2]
    write_jsonl(tmp_path / "data" / "new.jsonl", records("code", 5, start=700) + [rows[name] for name in held_out])
    write_jsonl(tmp_path / "data" / "new-eval.jsonl", records("code", 5, start=800) + [rows[name] for name in learned])
    path.write_text(
        path.read_text().replace(
            "\ndomains:\n", "\ndomains:\n  new: {train: data/new.jsonl, eval: data/new-eval.jsonl}\n"
        )
    )
    with pytest.raises(LeakError) as error:
        built(path)
    assert sorted(str(error.value).splitlines()[1:]) == sorted(
        [
            f"  {folder_of(config, 'law')}: sample {name} of 'law' also stands in the eval split of 'new'"
            for name in learned
        ]
        + [
            f"  data/new.jsonl:{6 + number}: sample {name} of 'new' also stands in the eval split of 'law'"
            for number, name in enumerate(held_out)
        ]
    )


def test_an_eval_split_written_by_hand_need_not_be_in_pool_order(tmp_path):
    encoded = [mds.encode_sample(sample) for sample in samples("law", 9)]
    layout = mds.Layout(1 << 20)
    data = layout.header(np.array(list(map(len, encoded)))) + b"".join(encoded)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / mds.shard_name(0)).write_bytes(data)
    (tmp_path / "eval" / mds.INDEX).write_bytes(layout.index([mds.ShardSize(9, len(data))]))
    pool = CommittedPool("law", tmp_path, in_order=False)
    found = [set(pool.held_out(keys, 0)) for keys in (KeyRange(0, KEYS // 2 - 1), KeyRange(KEYS // 2, KEYS - 1))]
    assert found[0] | found[1] == {f"law-{number:06d}" for number in range(9)}


# Rerun


def test_reduced_ranges_are_taken_up_while_no_eval_split_has_changed(shared, project, tmp_path, small_ranges):
    path, _ = leaking(shared, project, tmp_path)
    with pytest.raises(LeakError):
        built(path)
    folder = staging(load(path), "medicine") / "reduced"
    before = stamps(folder)
    assert len(before) > 10
    with pytest.raises(LeakError):
        built(path)
    assert stamps(folder) == before
    write_jsonl(tmp_path / "data" / "law-eval.jsonl", records("law", 5, start=900))
    config, manifests = built(path)
    assert manifests["medicine"].leaks_dropped == 0
    assert train_ids(config, "medicine") == train_ids(shared[0], "medicine")


def test_what_a_reduction_left_that_is_not_whole_is_done_again(shared, project, tmp_path, small_ranges):
    path, _ = leaking(shared, project, tmp_path)
    with pytest.raises(LeakError):
        built(path)
    folder = staging(load(path), "code") / "reduced"
    first, second, third = sorted(folder.glob("train-*.arrow"))[:3]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    third.with_suffix(".json").write_bytes(b'{"inputs": "')
    (folder / f".{first.name}.0.tmp").write_bytes(b"torn")
    write_jsonl(tmp_path / "data" / "law-eval.jsonl", records("law", 5, start=900))
    config, _ = built(path)
    assert train_ids(config, "code") == train_ids(shared[0], "code")
    assert not list(folder_of(config).rglob("*.tmp"))


# Memory

MEASURED = """
import json, re, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from vtmix.leaks import EvalSplits
from vtmix.pool import write_ipc
from vtmix.ranges import ENCODED_SCHEMA, EncodedDomain, key_ranges
from vtmix.reduce import ReduceTask, reduce_range

PARTS, ROWS, BYTES = 12, 1024, 8192
rng = np.random.default_rng(0)
encoded = EncodedDomain("law", Path(sys.argv[1]), PARTS)
for number in range(PARTS):
    keys = np.sort(rng.integers(0, 2**64, ROWS, dtype=np.uint64))
    content = rng.bytes(ROWS * BYTES)
    columns = {
        "key": keys,
        "held_out": [False] * ROWS,
        "where": ["law.jsonl:1"] * ROWS,
        "text": ["text"] * ROWS,
        "sample_id": [f"{key:020d}" for key in keys],
        "tokens": [1] * ROWS,
        "response_tokens": [1] * ROWS,
        "mds": [content[n * BYTES : (n + 1) * BYTES] for n in range(ROWS)],
    }
    write_ipc(encoded.part(number), pa.table(columns, ENCODED_SCHEMA))
del content, columns

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def peak(most, name, count=None):
    # In bytes, over what the process held before.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    splits = EvalSplits((encoded,), (), 0)
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    ranges = key_ranges(PARTS * ROWS * BYTES, most)
    tasks = [ReduceTask(encoded, "train", n, keys, splits, "", folder) for n, keys in enumerate(ranges[:count])]
    done = sum(reduce_range(task).samples for task in tasks)
    return done, status("VmHWM") - before

total = PARTS * ROWS * BYTES
peak(total // 24, "warm", 1)  # once: libraries and threads
print(json.dumps([total, *peak(total // 24, "many"), *peak(total, "one")]))
"""


def test_a_worker_needs_memory_for_its_range_and_not_for_the_domain(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    total, samples_of_many, many, samples_of_one, one = json.loads(done.stdout)
    assert samples_of_many == samples_of_one == 12 * 1024
    assert many < min(total, one / 4), (total, many, one)
    assert one > total
