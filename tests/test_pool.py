"""A pool is the same bytes however its sources are cut and whoever builds it, holds every record once, and is whole."""

import random
import resource
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from building import Builds
from conftest import WORDS, records, write_jsonl
from handmade import tree
from hypothesis import given, settings
from hypothesis import strategies as st

from vtmix import assemble, mds, reduce, sources
from vtmix import pool as pools
from vtmix.artifacts import run_folder
from vtmix.config import load
from vtmix.errors import ConfigError, ConflictError, DamageError, LeakError, MissingError, RecordError
from vtmix.mds import Samples
from vtmix.parts import EncodeTask, encode_part
from vtmix.pooling import build
from vtmix.records import Turn, sample_id

KILLS = 4
CRASHES = 10


def identity(row):
    return sample_id((Turn("user", row["prompt"]), Turn("assistant", row["response"])))


def folder_of(config, domain=None):
    folder = run_folder(config).pools
    return folder / domain if domain else folder


def built(path, **how):
    """The pools of a configuration, built in this process."""
    config = load(path)
    manifests = build(config, **{"workers": 1, **how})
    return config, manifests


def content(config):
    """Every file of every pool but pool.json, which also says what the pool was made from."""
    return {
        f"{domain}/{name}": digest
        for domain in config.domains
        for name, digest in tree(folder_of(config, domain)).items()
        if name != "pool.json"
    }


def train_ids(config, domain="law"):
    return list(pools.open_pool(folder_of(config, domain)).sample_ids())


def eval_ids(config, domain="law"):
    return [sample["sample_id"] for sample in Samples(folder_of(config, domain) / "eval")]


def nothing_published(config):
    return not any(folder_of(config, domain).exists() for domain in config.domains)


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """The project of conftest, written and built once: for tests that change nothing in it."""
    import conftest

    folder = tmp_path_factory.mktemp("shared")
    write = conftest.project.__wrapped__(folder, tiny_model)
    return built(write())


# Same sources, same bytes


@pytest.mark.parametrize("part_bytes", [64, 999])
def test_the_pool_does_not_depend_on_where_files_are_cut(shared, project, monkeypatch, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    config, _ = built(project())
    assert tree(folder_of(config, "law")) == tree(folder_of(shared[0], "law"))
    assert content(config) == content(shared[0])


def test_the_pool_does_not_depend_on_how_records_lie_in_files(shared, project, tmp_path):
    path = project()
    rows = records("law", 60)
    random.Random(7).shuffle(rows)
    (tmp_path / "data" / "law.jsonl").unlink()
    for number, start in enumerate((0, 1, 37)):
        write_jsonl(tmp_path / "data" / "law" / f"{number}.jsonl", rows[start : (1, 37, 60)[number]])
    path.write_text(path.read_text().replace("data/law.jsonl", "data/law/*.jsonl"))
    config, _ = built(path)
    assert content(config) == content(shared[0])


def test_the_pool_does_not_depend_on_the_number_of_workers(shared, project):
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    config, _ = built(project(), workers=2)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > children
    assert content(config) == content(shared[0])
    assert (folder_of(config, "law") / "pool.json").read_bytes() == (
        folder_of(shared[0], "law") / "pool.json"
    ).read_bytes()


def test_small_sources_are_worth_no_worker(project):
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    built(project(), workers=None)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == children


def test_the_parts_of_a_pool_hold_its_order(shared, project, monkeypatch):
    monkeypatch.setattr(reduce, "PART_BYTES", 2000)
    config, manifests = built(project())
    parts = manifests["law"].parts
    assert train_ids(config) == train_ids(shared[0])
    assert len(parts) > 5
    assert max(part.sample_bytes for part in parts) < 3 * 2000


# What a pool holds


def test_a_pool_holds_every_record_once_as_it_was_encoded(shared):
    config, manifests = shared
    for domain, manifest in manifests.items():
        samples = list(pools.open_pool(folder_of(config, domain)).samples(0, manifest.samples))
        samples += list(Samples(folder_of(config, domain) / "eval"))
        assert {sample["sample_id"] for sample in samples} == {identity(row) for row in records(domain, 60)}
        assert len(samples) == 60
        assert {sample["domain"] for sample in samples} == {domain}
        assert manifest.tokens + manifest.eval.tokens == sum(len(sample["input_ids"]) for sample in samples)
        assert manifest.response_tokens + manifest.eval.response_tokens == sum(
            int((sample["labels"] != -100).sum()) for sample in samples
        )


def test_the_manifest_measures_the_samples(shared):
    config, manifests = shared
    pool = pools.open_pool(folder_of(config, "law"))
    sizes = [len(mds.encode_sample(sample)) for sample in pool.samples(0, manifests["law"].samples)]
    assert manifests["law"].bytes == sum(sizes)
    assert manifests["law"].max_sample_bytes == max(sizes)


def accounted(manifest):
    return manifest.records == (
        manifest.samples
        + manifest.eval.samples
        + manifest.duplicates
        + manifest.rejected
        + manifest.overlong_dropped
        + manifest.leaks_dropped
    )


def test_duplicates_are_dropped_and_counted(shared, project, tmp_path):
    path = project()
    write_jsonl(tmp_path / "data" / "law.jsonl", records("law", 60) + records("law", 30) + records("law", 10))
    config, manifests = built(path)
    assert manifests["law"].duplicates == 40
    assert accounted(manifests["law"])
    assert content(config) == content(shared[0])


def test_overlong_samples_are_cut_or_dropped_and_counted(project, tmp_path):
    rows = [
        {"prompt": "Tell me", "response": "a " * 500},
        {"prompt": "Tell me", "response": "b " * 500},
        {"prompt": "a " * 500, "response": "Tell me"},
    ]
    path = project()
    write_jsonl(tmp_path / "data" / "law.jsonl", records("law", 40) + rows)
    _, manifests = built(path)
    assert (manifests["law"].truncated, manifests["law"].overlong_dropped) == (2, 1)
    assert accounted(manifests["law"])
    path = project(tmp_path / "dropping", encoding={"overlong": "drop"})
    write_jsonl(tmp_path / "dropping" / "data" / "law.jsonl", records("law", 40) + rows)
    config, manifests = built(path)
    assert (manifests["law"].truncated, manifests["law"].overlong_dropped) == (0, 3)
    assert accounted(manifests["law"])
    assert set(train_ids(config)) | set(eval_ids(config)) == {identity(row) for row in records("law", 40)}


def test_the_kept_texts_are_the_first_training_texts_in_pool_order(shared, project, tmp_path):
    path = project(pool={"texts": 5})
    write_jsonl(tmp_path / "data" / "law.jsonl", 5 * records("law", 60))
    config, _ = built(path)
    said = {identity(row): f"{row['prompt']}\n{row['response']}" for row in records("law", 60)}
    assert pools.texts(folder_of(config, "law")) == [said[name] for name in train_ids(shared[0])[:5]]
    table = pq.read_table(folder_of(config, "law") / "texts.parquet")
    assert table["sample_id"].to_pylist() == train_ids(shared[0])[:5]


def test_pools_hold_no_absolute_path(shared):
    config, _ = shared
    for path in folder_of(config).rglob("*"):
        assert not path.is_file() or str(config.root).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("nothing", ["", "\n\n"])
def test_a_source_without_records_gives_an_empty_pool(project, tmp_path, nothing):
    path = project()
    (tmp_path / "data" / "law.jsonl").write_text(nothing)
    config, manifests = built(path)
    assert (manifests["law"].samples, manifests["law"].eval.samples, manifests["law"].records) == (0, 0, 0)
    assert train_ids(config) == eval_ids(config) == pools.texts(folder_of(config, "law")) == []
    assert manifests["code"].samples > 0


# The eval split


def test_a_share_is_held_out_by_hash(project):
    config, manifests = built(project(samples=600, pool={"eval_fraction": 0.3}))
    for manifest in manifests.values():
        assert 180 - 45 < manifest.eval.samples < 180 + 45  # 4 standard deviations
    assert not set(train_ids(config)) & set(eval_ids(config))


def test_new_data_leaves_the_order_of_the_rest_alone(shared, project, tmp_path):
    path = project()
    write_jsonl(tmp_path / "data" / "law.jsonl", records("law", 30, start=500) + records("law", 60))
    config, _ = built(path)
    for ids in (train_ids, eval_ids):
        before = ids(shared[0])
        assert [name for name in ids(config) if name in before] == before
        assert len(ids(config)) > len(before)


def test_the_pools_seed_changes_the_order_and_the_split(shared, project):
    config, _ = built(project(pool={"seed": 1}))
    assert set(eval_ids(config)) != set(eval_ids(shared[0]))
    common = set(train_ids(config)) & set(train_ids(shared[0]))
    assert [n for n in train_ids(config) if n in common] != [n for n in train_ids(shared[0]) if n in common]


def with_eval(project, tmp_path, rows, **overrides):
    """A project whose law domain has eval sources of its own."""
    path = project(domains={"law": {"train": "data/law.jsonl", "eval": "data/law-eval.jsonl"}}, **overrides)
    write_jsonl(tmp_path / "data" / "law-eval.jsonl", rows)
    return path


def test_eval_sources_are_the_eval_split(project, tmp_path):
    rows = records("law", 9, start=900)
    config, manifests = built(with_eval(project, tmp_path, rows + rows[:2]))
    assert set(eval_ids(config)) == {identity(row) for row in rows}
    assert set(train_ids(config)) == {identity(row) for row in records("law", 60)}
    assert manifests["law"].duplicates == 2
    assert accounted(manifests["law"])


def test_the_eval_split_is_mds_that_streaming_reads(shared):
    from streaming import StreamingDataset

    config, manifests = shared
    folder = folder_of(config, "law") / "eval"
    ours = list(Samples(folder))
    assert len(ours) == manifests["law"].eval.samples
    theirs = StreamingDataset(local=str(folder), shuffle=False, num_canonical_nodes=1, batch_size=1)
    assert len(theirs) == len(ours)
    for sample, other in zip(ours, theirs, strict=True):
        assert sample.keys() == other.keys()
        assert all(np.array_equal(sample[key], other[key]) for key in sample)


def test_an_eval_split_of_several_shards_is_read_back_whole(shared, project, monkeypatch):
    monkeypatch.setattr(assemble, "EVAL_SHARD_BYTES", 3000)
    config, _ = built(project())
    shards = sorted((folder_of(config, "law") / "eval").glob("*.mds"))
    assert len(shards) > 1
    assert all(shard.stat().st_size <= 3000 for shard in shards)
    assert [s["sample_id"] for s in Samples(folder_of(config, "law") / "eval")] == eval_ids(shared[0])


# Leaks


def trained(shared, domain, count):
    """Numbers of records that the domain trains on, and so are not held out by hash."""
    config, _ = shared
    return [n for n, row in enumerate(records(domain, 60)) if identity(row) in train_ids(config, domain)][:count]


def test_a_leak_across_domains_stops_the_build_and_names_both_places(shared, project, tmp_path):
    rows = records("medicine", 60)
    leaked = trained(shared, "medicine", 2)
    path = with_eval(project, tmp_path, records("law", 5, start=900) + [rows[n] for n in leaked])
    with pytest.raises(LeakError) as error:
        built(path)
    first, *lines = str(error.value).splitlines()
    assert first == (
        "2 training samples also stand in an eval split, no pool was built (remove them, or set pool.leak to 'drop'):"
    )
    assert sorted(lines) == [
        f"  data/medicine.jsonl:{line + 1}: sample {identity(rows[line])} of 'medicine' also stands in the eval split "
        "of 'law'"
        for line in leaked
    ]
    assert nothing_published(load(path))


def test_leaks_are_dropped_where_that_is_set(shared, project, tmp_path):
    rows = records("medicine", 60)
    leaked = [rows[n] for n in trained(shared, "medicine", 2)] + records("law", 3)
    path = with_eval(project, tmp_path, records("law", 5, start=900) + leaked, pool={"leak": "drop"})
    config, manifests = built(path)
    dropped = {identity(row) for row in leaked}
    assert dropped < set(eval_ids(config, "law"))
    assert not dropped & set(train_ids(config, "medicine") + train_ids(config, "law"))
    assert (manifests["law"].leaks_dropped, manifests["medicine"].leaks_dropped) == (3, 2)
    assert all(accounted(manifest) for manifest in manifests.values())
    assert len(pools.texts(folder_of(config, "law"))) == manifests["law"].samples == 57


@pytest.mark.parametrize("leak", ["stop", "drop"])
def test_a_leak_into_a_pool_that_is_committed_always_stops_the_build(project, tmp_path, leak):
    path = project(pool={"leak": leak})
    config, _ = built(path)
    learned = next(row for row in records("law", 60) if identity(row) in train_ids(config))
    write_jsonl(tmp_path / "data" / "new.jsonl", records("code", 5, start=700))
    write_jsonl(tmp_path / "data" / "new-eval.jsonl", [learned])
    added = path.read_text().replace(
        "\ndomains:\n", "\ndomains:\n  new: {train: data/new.jsonl, eval: data/new-eval.jsonl}\n"
    )
    path.write_text(added)
    with pytest.raises(
        LeakError, match=f"/law: sample {identity(learned)} of 'law' also stands in the eval split of 'new'"
    ):
        built(path)
    assert not folder_of(config, "new").exists()


def test_a_domain_added_later_is_held_against_committed_eval_splits(project, tmp_path):
    path = project()
    config, _ = built(path)
    held_out = next(row for row in records("law", 60) if identity(row) in eval_ids(config))
    write_jsonl(tmp_path / "data" / "new.jsonl", [held_out])
    write_jsonl(tmp_path / "data" / "new-eval.jsonl", records("code", 5, start=700))
    path.write_text(
        path.read_text().replace(
            "\ndomains:\n", "\ndomains:\n  new: {train: data/new.jsonl, eval: data/new-eval.jsonl}\n"
        )
    )
    with pytest.raises(LeakError, match=r"data/new.jsonl:1: sample .* of 'new' also stands in the eval split of 'law'"):
        built(path)


# Refusals


def test_all_bad_records_of_all_domains_are_named_and_nothing_is_published(project, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    path = project()
    with (tmp_path / "data" / "law.jsonl").open("ab") as file:
        file.write(b'{"prompt": "a\xff"}\n{"prompt": "<|im_end|>", "response": "b"}\n[]\n')
    with (tmp_path / "data" / "code.jsonl").open("ab") as file:
        file.write(b"\n\n7")
    with pytest.raises(RecordError) as error:
        built(path)
    assert str(error.value).splitlines() == [
        "4 of 184 records cannot be used (pool.max_bad_records is 0), no pool was built:",
        "  data/code.jsonl:63: expected an object with fields, found a number",
        "  data/law.jsonl:61: text is not UTF-8 (byte 0xff at column 14)",
        "  data/law.jsonl:62: the user turn spells the special token '<|im_end|>', which would end or open a turn",
        "  data/law.jsonl:63: expected an object with fields, found a list",
    ]
    assert nothing_published(load(path))


def test_bad_records_within_the_tolerance_are_counted(shared, project, tmp_path):
    path = project(pool={"max_bad_records": 2})
    with (tmp_path / "data" / "law.jsonl").open("a") as file:
        file.write("{}\n[]\n")
    config, manifests = built(path)
    assert manifests["law"].rejected == 2
    assert accounted(manifests["law"])
    assert content(config) == content(shared[0])
    with (tmp_path / "data" / "code.jsonl").open("a") as file:
        file.write("{}\n")
    config = load(path, run=tmp_path / "other")
    with pytest.raises(RecordError, match=r"^3 of 183 records cannot be used \(pool.max_bad_records is 2\)"):
        build(config, workers=1)


def test_all_sources_that_cannot_be_read_are_named_together(project, tmp_path):
    path = project()
    (tmp_path / "data" / "law.jsonl").unlink()
    (tmp_path / "data" / "code.jsonl").rename(tmp_path / "data" / "code.csv")
    path.write_text(path.read_text().replace("code.jsonl", "code.csv"))
    with pytest.raises(RecordError) as error:
        built(path)
    assert "domain 'law': data/law.jsonl: no such file" in str(error.value)
    assert "domain 'code': " in str(error.value)
    assert "data/code.csv: expected a name ending in .jsonl or .parquet" in str(error.value)


def test_a_worker_with_another_tokenizer_refuses(shared, tmp_path, tiny_model):
    config, _ = shared
    (source,) = sources.open_source(config.domains["law"].train[0], config).parts
    task = EncodeTask(
        domain="law",
        part=source,
        eval_source=False,
        model=str(tiny_model),
        revision=None,
        tokenizer="another",
        encoding=config.encoding,
        seed=0,
        eval_fraction=0.1,
        out=tmp_path / "x.arrow",
    )
    with pytest.raises(ConfigError, match="gives a worker another tokenizer than it gave at the start of the build"):
        encode_part(task)


# Rerun, change, interruption


def stamps(folder):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
        if path.name != ".pool.lock"
    }


def test_a_rerun_changes_nothing(project):
    path = project()
    config, first = built(path)
    before = stamps(folder_of(config))
    _, second = built(path)
    assert stamps(folder_of(config)) == before
    assert first == second


def test_a_change_is_refused_and_named(project, tmp_path):
    path = project()
    config, _ = built(path)
    before = stamps(folder_of(config))
    settled = path.read_text()
    data = tmp_path / "data" / "law.jsonl"
    changes = {
        "max_length: 64": ("max_length: 32", "encoding.max_length was 64, is now 32"),
        "eval_fraction: 0.2": ("eval_fraction: 0.3", "eval_fraction was 0.2, is now 0.3"),
        "train: data/law.jsonl": (
            "train: {path: data/law.jsonl, response: prompt}",
            "sources.train.0.response was 'response', is now 'prompt'",
        ),
    }
    for old, (new, difference) in changes.items():
        path.write_text(settled.replace(old, new))
        assert path.read_text() != settled
        with pytest.raises(ConflictError, match=r"pool.json was made from other inputs") as error:
            built(path)
        assert f"\n  {difference}\n" in str(error.value)
    path.write_text(settled)
    data.write_text(data.read_text().replace(" 3.", " 4."))
    with pytest.raises(ConflictError, match=r"\n  files.train.data/law.jsonl was '\w+…, is now '\w+…\n"):
        built(path)
    assert stamps(folder_of(config)) == before


def test_pools_built_elsewhere_are_the_same_files(shared, tmp_path):
    config, _ = shared
    shutil.copytree(config.root, tmp_path / "moved", ignore=shutil.ignore_patterns("run"))
    moved, _ = built(tmp_path / "moved" / "mixture.yaml")
    assert tree(folder_of(moved)) == tree(folder_of(config))


def test_two_runs_share_a_pool_folder(project, tmp_path):
    path = project(pool={"folder": "pools"})
    everything = path.read_text()
    domains = {name: f"  {name}:\n    train: data/{name}.jsonl\n" for name in WORDS}
    path.write_text(everything.replace(domains["code"], "").replace("seed: 7", "seed: 8"))
    config, first = built(path)
    assert list(first) == ["law", "medicine"]
    before = stamps(folder_of(config, "medicine"))
    path.write_text(everything.replace(domains["law"], "").replace("seed: 7", "seed: 9"))
    config, second = built(path)
    assert list(second) == ["medicine", "code"]
    assert folder_of(config) == tmp_path / "pools"
    assert stamps(folder_of(config, "medicine")) == before
    assert first["medicine"] == second["medicine"]


class Interrupted:
    """A project, the bytes its pools must have, and builds of it that end before they are done."""

    def __init__(self, path, builds, folder):
        self.path, self.builds, self.folder = path, builds, folder
        self.golden = self.finish("golden")
        shutil.rmtree(folder / "golden")

    def finish(self, run):
        end = self.builds.build(self.path, self.folder / run)
        assert end.code == 0, end.output
        pool = self.folder / run / "pool"
        assert sorted(path.name for path in pool.iterdir() if path.name != ".pool.lock") == sorted(WORDS)
        return {name: tree(pool / name) for name in WORDS}

    def check(self, run):
        """What is visible is whole, and the next build completes it to the same bytes."""
        pool = self.folder / run / "pool"
        visible = [name for name in WORDS if (pool / name).exists()]
        for name in visible:
            assert tree(pool / name) == self.golden[name]
        before = {name: stamps(pool / name) for name in visible}
        assert self.finish(run) == self.golden
        for name in visible:
            assert stamps(pool / name) == before[name]
        shutil.rmtree(self.folder / run)
        return len(visible)


@pytest.fixture(scope="module")
def interrupted(tiny_model, tmp_path_factory):
    import conftest

    folder = tmp_path_factory.mktemp("interrupted")
    path = conftest.project.__wrapped__(folder, tiny_model)(samples=30)
    with Builds() as builds:
        yield Interrupted(path, builds, folder)


def test_a_build_that_dies_anywhere_publishes_only_whole_pools_and_is_completed(interrupted):
    end = interrupted.builds.build(interrupted.path, interrupted.folder / "count")
    shutil.rmtree(interrupted.folder / "count")
    visible = set()
    for event in sorted(random.Random(7).sample(range(end.events // 3, end.events), CRASHES)):
        died = interrupted.builds.build(interrupted.path, interrupted.folder / "run", exit_at=event)
        assert died.code == 137, died.output
        visible.add(interrupted.check("run"))
    assert len(visible) > 1


def test_a_build_killed_at_random_is_completed_to_the_same_bytes(interrupted):
    whole = interrupted.builds.build(interrupted.path, interrupted.folder / "time").seconds
    shutil.rmtree(interrupted.folder / "time")
    moments = random.Random(7)
    for _ in range(KILLS):
        # Each build of a run is killed twice before it may end.
        for _ in range(2):
            interrupted.builds.build(
                interrupted.path, interrupted.folder / "run", kill_after=whole * moments.uniform(0.2, 1)
            )
        interrupted.check("run")


def test_a_build_that_cannot_write_says_so_and_publishes_only_whole_pools(interrupted):
    events = interrupted.builds.build(interrupted.path, interrupted.folder / "count", fail_at=10**9).events
    shutil.rmtree(interrupted.folder / "count")
    for event in sorted(random.Random(8).sample(range(1, events), CRASHES // 2)):
        failed = interrupted.builds.build(interrupted.path, interrupted.folder / "run", fail_at=event)
        assert failed.code == 1, failed.output
        assert "No space left on device" in failed.output
        interrupted.check("run")


def refused(path):
    """A configuration whose build encoded every domain and published none."""
    data = path.parent / "data" / "code.jsonl"
    settled = data.read_text()
    data.write_text(settled + "{}\n")
    config = load(path)
    with pytest.raises(RecordError):
        build(config, workers=1)
    data.write_text(settled)
    return config


def staging(config, domain):
    (folder,) = folder_of(config).glob(f".staging-{domain}.*")
    return folder


def test_encoded_parts_are_taken_up_by_the_next_build(shared, project):
    config = refused(project())
    encoded = staging(config, "law") / "encoded"
    before = stamps(encoded)
    refused(config.root / "mixture.yaml")
    assert stamps(encoded) == before
    build(config, workers=1)
    assert content(config) == content(shared[0])


def test_encoded_parts_cut_otherwise_are_not_taken_up(shared, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", 1500)
        config = refused(project())
    build(config, workers=1)
    assert content(config) == content(shared[0])


def test_files_of_an_interrupted_build_are_not_published(shared, project):
    config = refused(project())
    left = staging(config, "law")
    (left / "pool" / "eval").mkdir(parents=True)
    for stray in ("encoded/.000000.arrow.0.tmp", "pool/part-00007.arrow", "pool/eval/shard.00007.mds"):
        (left / stray).write_bytes(b"stray")
    build(config, workers=1)
    assert content(config) == content(shared[0])
    assert not list(folder_of(config).glob(".staging-*"))


def test_what_a_build_left_that_was_killed_when_it_had_just_published_is_removed(project):
    path = project()
    config, _ = built(path)
    left = folder_of(config) / ".staging-law.0123456789abcdef"
    left.mkdir()
    built(path)
    assert not left.exists()


# Reading


@settings(deadline=None)
@given(position=st.integers(0, 10**12), count=st.integers(0, 300))
def test_a_window_is_a_stretch_of_the_endless_repetition(tmp_path_factory, shared, position, count):
    pool = repeated(shared, tmp_path_factory)
    ids = list(pool.sample_ids())
    found = [name for table in pool.window(position, count) for name in table["sample_id"].to_pylist()]
    assert found == [ids[(position + n) % len(ids)] for n in range(count)]


POOLS = {}


def repeated(shared, tmp_path_factory):
    """A pool of many parts."""
    if not POOLS:
        config, _ = shared
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reduce, "PART_BYTES", 2000)
            folder = tmp_path_factory.mktemp("parts")
            build(config, folder=folder, workers=1)
        POOLS["law"] = pools.open_pool(folder / "law")
        assert len(POOLS["law"].manifest.parts) > 3
    return POOLS["law"]


def test_the_samples_of_a_window_are_those_of_its_tables(shared):
    pool = pools.open_pool(folder_of(shared[0], "law"))
    ids = list(pool.sample_ids())
    assert [sample["sample_id"] for sample in pool.samples(len(ids) - 3, 9)] == ids[-3:] + ids[:6]


def test_a_pool_that_is_missing_or_damaged_is_named(project, tmp_path):
    with pytest.raises(MissingError, match="run `vtmix pool` first"):
        pools.open_pool(tmp_path / "law")
    config, _ = built(project())
    pool = pools.open_pool(folder_of(config, "law"))
    part = folder_of(config, "law") / "part-00000.arrow"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(DamageError, match=r"part-00000.arrow has [\d,]+ bytes, pool.json says "):
        pool.part(0)
    part.unlink()
    with pytest.raises(DamageError, match=r"part-00000.arrow is missing, though law/pool.json lists it"):
        pool.part(0)
