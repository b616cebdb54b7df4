"""An epoch on disk is exactly what its plan says, the same bytes whoever writes it, and never written twice."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import WORDS, records, write_jsonl
from handmade import SHARES, SIZES, run_of, samples, tree, write_config, write_pool, write_weights

from vtmix import mds
from vtmix import pool as pools
from vtmix.artifacts import Plan, PoolManifest, run_folder
from vtmix.compile import compile_epoch, made_from, main, open_pools, planned
from vtmix.config import load
from vtmix.errors import ConflictError, DamageError, MissingError, MixtureError
from vtmix.plan import arrangement
from vtmix.pooling import build
from vtmix.verify import require_intact

GOLDEN = {
    "index.json": "09ae007011a69dd5120357e27f8ce2f4a26869385e6b464d10de456ad7af33d7",
    "shard.00000.mds": "d56fd69598c5b23c0e2dfd7b913c46c5d45b95a3ad8ddccb624eb1ac56f2b0c3",
    "shard.00001.mds": "571d44ba8ebe70237ff204bbe2b916052d612b609351f09b9d7910db4f167bcb",
}


@pytest.fixture(scope="module")
def built(tiny_model, tmp_path_factory):
    """A folder whose pools were built from records; copy it before changing it."""
    folder = tmp_path_factory.mktemp("built")
    for domain in WORDS:
        write_jsonl(folder / f"{domain}.jsonl", records(domain, 60))
    build(load(write_config(folder, WORDS, model=str(tiny_model))), workers=1)
    return folder


def digest(folder):
    return hashlib.sha256(json.dumps(tree(folder)).encode()).hexdigest()


def planned_ids(config, epoch):
    """The ids an epoch holds, in order: from the counts and positions of its plan and the order of the pools alone."""
    run = run_folder(config)
    plan = Plan.read(run.plan(epoch), "")
    names = list(plan.domains)
    order = {name: list(pools.open_pool(run.pool(name)).sample_ids()) for name in names}
    domains, ranks = arrangement(plan).stretch(0, plan.samples)
    for domain, rank in zip(domains.tolist(), ranks.tolist(), strict=True):
        name = names[domain]
        yield order[name][(plan.domains[name].position + rank) % len(order[name])]


def ids_on_disk(folder):
    return [sample["sample_id"] for sample in mds.Samples(folder)]


@contextlib.contextmanager
def streamed(folder):
    """A mixture as a trainer reads it."""
    from streaming import StreamingDataset

    yield StreamingDataset(local=str(folder), shuffle=False, num_canonical_nodes=1, batch_size=1)


def python_m_compile(*arguments, cwd=None, umask=-1, **environment):
    return subprocess.run(
        [sys.executable, "-m", "vtmix.compile", *map(str, arguments)],
        cwd=cwd,
        umask=umask,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# What stands in an epoch


def test_streaming_dataset_reads_the_planned_samples_in_the_planned_order(tmp_path):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    run = run_folder(config)
    known = {sample["sample_id"]: sample for name, size in SIZES.items() for sample in samples(name, size)}
    with streamed(run.mixture(1)) as dataset:
        found = [dataset[number] for number in range(len(dataset))]
    assert [sample["sample_id"] for sample in found] == list(planned_ids(config, 1))
    for sample in found:
        expected = known[sample["sample_id"]]
        assert sample["domain"] == expected["domain"]
        assert sample["input_ids"].dtype == sample["labels"].dtype == np.int32
        assert sample["input_ids"].tolist() == expected["input_ids"].tolist()
        assert sample["labels"].tolist() == expected["labels"].tolist()


def test_a_pool_built_from_records_is_read_back_as_planned(built, tmp_path):
    config = load(shutil.copytree(built, tmp_path / "copy") / "mixture.yaml")
    write_weights(config, 1)
    manifest, _ = compile_epoch(config, 1)
    with streamed(run_folder(config).mixture(1)) as dataset:
        found = [dataset[number] for number in range(len(dataset))]
    assert [sample["sample_id"] for sample in found] == list(planned_ids(config, 1))
    assert manifest.tokens == sum(len(sample["input_ids"]) for sample in found)
    response_tokens = sum(int((sample["labels"] != -100).sum()) for sample in found)
    assert response_tokens == sum(domain.response_tokens for domain in manifest.domains.values())


def test_counts_tokens_and_bytes_of_the_manifest_are_those_of_the_shards(tmp_path):
    config = run_of(tmp_path)
    manifest, _ = compile_epoch(config, 1)
    folder = run_folder(config).mixture(1)
    found = list(mds.Samples(folder))
    counts = {"law": 60, "medicine": 24, "code": 36}
    assert {name: domain.samples for name, domain in manifest.domains.items()} == counts
    assert Counter(sample["domain"] for sample in found) == counts
    for name, domain in manifest.domains.items():
        mine = [sample for sample in found if sample["domain"] == name]
        assert domain.tokens == sum(len(sample["input_ids"]) for sample in mine)
        assert domain.response_tokens == sum(int((sample["labels"] != -100).sum()) for sample in mine)
        assert domain.proportion == len(mine) / len(found)
    assert manifest.bytes == sum(path.stat().st_size for path in folder.glob("*.mds"))
    assert manifest.tokens == sum(domain.tokens for domain in manifest.domains.values())


def test_every_sample_appears_equally_often_within_and_across_epochs(tmp_path):
    config = run_of(tmp_path)
    write_weights(config, 2, {"law": 0.1, "medicine": 0.6, "code": 0.3})
    write_weights(config, 3, {"law": 0.0, "medicine": 0.25, "code": 0.75})
    appearances = Counter()
    for epoch in (1, 2, 3):
        compile_epoch(config, epoch)
        folder = run_folder(config).mixture(epoch)
        within = Counter(ids_on_disk(folder))
        appearances += within
        for found in (within, appearances):
            for name, size in SIZES.items():
                times = [found[sample["sample_id"]] for sample in samples(name, size)]
                assert min(times) == sum(times) // size, (epoch, name)
                assert max(times) == -(-sum(times) // size), (epoch, name)
        assert list(planned_ids(config, epoch)) == ids_on_disk(folder)


def test_a_domain_of_weight_0_may_have_an_empty_pool(tmp_path):
    config = run_of(tmp_path, {"law": 30, "empty": 0}, {"law": 1.0, "empty": 0.0})
    manifest, _ = compile_epoch(config, 1)
    assert manifest.domains["empty"].samples == manifest.domains["empty"].tokens == 0
    assert {sample["domain"] for sample in mds.Samples(run_folder(config).mixture(1))} == {"law"}


def test_an_epoch_of_one_sample_and_one_of_many_passes_are_compiled(tmp_path):
    one = run_of(tmp_path / "one", samples_per_epoch=1)
    compile_epoch(one, 1)
    assert len(ids_on_disk(run_folder(one).mixture(1))) == 1
    many = run_of(tmp_path / "many", {"law": 3}, {"law": 1.0}, samples_per_epoch=1000)
    compile_epoch(many, 1)
    assert sorted(Counter(ids_on_disk(run_folder(many).mixture(1))).values()) == [333, 333, 334]
    require_intact(run_folder(many).mixture(1))


def test_no_shard_exceeds_shard_bytes_and_there_may_be_many(tmp_path):
    config = run_of(tmp_path, samples_per_epoch=4000, mixture={"shard_bytes": 4096})
    compile_epoch(config, 1)
    sizes = [path.stat().st_size for path in run_folder(config).mixture(1).glob("*.mds")]
    assert len(sizes) > 150
    assert max(sizes) <= 4096
    assert ids_on_disk(run_folder(config).mixture(1)) == list(planned_ids(config, 1))


def test_windows_over_part_boundaries_and_the_end_of_a_pool_lose_nothing(tmp_path):
    config = run_of(tmp_path, {"law": 10}, {"law": 1.0}, samples_per_epoch=70)
    run = run_folder(config)
    shutil.rmtree(run.pool("law"))
    write_pool(run.pool("law"), "law", list(samples("law", 10)), parts=5)
    compile_epoch(config, 1)
    found = ids_on_disk(run.mixture(1))
    start = int(found[0].removeprefix("law-"))
    assert found == [f"law-{(start + number) % 10:06d}" for number in range(70)]


# The same bytes


def test_golden_bytes(tmp_path):
    """Held by digests, so that a change of NumPy, Arrow or of this code that moves a byte is seen."""
    config = run_of(tmp_path, samples_per_epoch=40, mixture={"shard_bytes": 8192})
    compile_epoch(config, 1)
    found = tree(run_folder(config).mixture(1))
    del found["manifest.json"]  # holds the pools' fingerprints, and so the digests of Arrow's own files
    assert found == GOLDEN


def test_workers_folder_locale_umask_and_process_change_no_byte(tmp_path):
    here = run_of(tmp_path / "here")
    compile_epoch(here, 1, workers=1)
    expected = digest(run_folder(here).mixture(1))
    run_of(tmp_path / "here" / "two")
    there = tmp_path / "there" / "рядом"
    run_of(there)
    shutil.move(there / "run", there / "elsewhere")
    trials = [
        (["--workers", 2], {"cwd": tmp_path / "here" / "two"}, tmp_path / "here" / "two" / "run"),
        (
            ["--config", there / "mixture.yaml", "--run", "elsewhere", "--workers", 1],
            {"cwd": there, "umask": 0o077, "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
            there / "elsewhere",
        ),
    ]
    for options, environment, run in trials:
        done = python_m_compile("--epoch", 1, *options, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("committed: ")
        assert digest(run / "mixture" / "epoch-0001") == expected
    assert (there / "elsewhere" / "mixture" / "epoch-0001" / "shard.00000.mds").stat().st_mode & 0o077 == 0


def test_the_order_in_which_domains_are_listed_changes_no_byte(tmp_path):
    backwards = dict(reversed(SIZES.items()))
    digests = []
    for name, sizes in {"one": SIZES, "other": backwards}.items():
        config = run_of(tmp_path / name, sizes, {domain: SHARES[domain] for domain in sizes})
        compile_epoch(config, 1)
        found = tree(run_folder(config).mixture(1))
        del found["manifest.json"]
        digests.append(found)
    assert digests[0] == digests[1]


def test_another_seed_arranges_and_starts_otherwise(tmp_path):
    found = []
    for seed in (1, 2):
        config = run_of(tmp_path / str(seed), seed=seed)
        compile_epoch(config, 1)
        found.append(ids_on_disk(run_folder(config).mixture(1)))
    assert found[0] != found[1]
    assert Counter(identity[:4] for identity in found[0]) == Counter(identity[:4] for identity in found[1])


# Never written twice


def stamps(folder):
    """Inode, size and time of change of everything below a folder."""
    return {
        str(path): (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
        for found in [path.lstat()]
    }


def test_an_epoch_that_is_up_to_date_is_left_alone_to_the_last_inode(tmp_path, capsys):
    config = run_of(tmp_path)
    first, fresh = compile_epoch(config, 1)
    assert fresh
    before = stamps(tmp_path)
    again, fresh = compile_epoch(config, 1)
    assert (again, fresh) == (first, False)
    assert main(["--config", str(tmp_path / "mixture.yaml"), "--epoch", "1"]) == 0
    assert capsys.readouterr().out.startswith("up to date: ")
    assert stamps(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 8}, r"seed was 7, is now 8"),
        ({"samples_per_epoch": 121}, r"samples was 120, is now 121"),
        ({"mixture": {"shard_bytes": 8193}}, r"shard_bytes was 8192, is now 8193"),
    ],
)
def test_an_epoch_of_other_settings_is_refused_by_name(tmp_path, change, sentence):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    before = stamps(run_folder(config).path)
    with pytest.raises(ConflictError, match=sentence):
        compile_epoch(load(write_config(tmp_path, **change)), 1)
    assert stamps(run_folder(config).path) == before


def test_an_epoch_of_other_weights_is_refused_by_name(tmp_path):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    run_folder(config).weights(1).unlink()
    write_weights(config, 1, {"law": 0.4, "medicine": 0.3, "code": 0.3})
    with pytest.raises(ConflictError, match=r"weights\.law was 0\.5, is now 0\.4\n  weights\.medicine was 0\.2"):
        compile_epoch(config, 1)


def test_an_epoch_of_another_pool_is_refused_by_name(tmp_path):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    shutil.rmtree(run_folder(config).pool("code"))
    write_pool(run_folder(config).pool("code"), "code", list(samples("code", 26)))
    with pytest.raises(ConflictError, match=r"pools\.code was '[0-9a-f]+…, is now '[0-9a-f]+…"):
        compile_epoch(config, 1)


def test_a_mixture_whose_plan_was_lost_is_refused_by_the_plans_difference(tmp_path):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    run_folder(config).plan(1).unlink()
    assert compile_epoch(config, 1)[1] is False
    assert run_folder(config).plan(1).exists()
    run_folder(config).plan(1).unlink()
    with pytest.raises(ConflictError, match=r"manifest\.json was made from other.*\n  plan\.seed was 7, is now 8"):
        compile_epoch(load(write_config(tmp_path, seed=8)), 1)


def test_a_folder_that_vtmix_did_not_write_is_left_alone(tmp_path):
    config = run_of(tmp_path)
    foreign = run_folder(config).mixture(1) / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(ConflictError, match=r"epoch-0001: exists without manifest\.json, so vtmix did not write it"):
        compile_epoch(config, 1)
    assert foreign.read_text() == "mine"


def test_a_plan_written_by_hand_is_carried_out(tmp_path):
    config = run_of(tmp_path)
    run = run_folder(config)
    plan = planned(config, 1, open_pools(config)).model_dump(mode="json", exclude={"inputs"})
    plan["shards"] = 3
    plan["domains"]["law"]["position"] = 5
    run.plan(1).parent.mkdir()
    run.plan(1).write_text(json.dumps(plan))
    compile_epoch(config, 1)
    assert len(list(run.mixture(1).glob("*.mds"))) == 3
    assert next(name for name in ids_on_disk(run.mixture(1)) if name.startswith("law")) == "law-000005"


def test_a_plan_written_by_hand_that_does_not_add_up_is_refused(tmp_path):
    config = run_of(tmp_path)
    run = run_folder(config)
    plan = planned(config, 1, open_pools(config)).model_dump(mode="json", exclude={"inputs"})
    plan["domains"]["law"]["count"] += 1
    run.plan(1).parent.mkdir()
    run.plan(1).write_text(json.dumps(plan))
    with pytest.raises(MixtureError, match="counts 121 samples in its domains, 120 in all"):
        compile_epoch(config, 1)
    assert not run.mixture(1).exists()


# Refused before anything is written


IMPOSSIBLE = {
    "empty pools": (
        {"sizes": {"law": 0, "medicine": 9, "code": 0}},
        MixtureError,
        [
            "domain 'law' has weight 0.5 but its pool is empty: add samples, or set its weight to 0",
            "domain 'code' has weight 0.3 but its pool is empty: add samples, or set its weight to 0",
        ],
    ),
    "too many passes": (
        {"mixture": {"max_passes": 0.5}},
        MixtureError,
        [
            "domain 'law' needs 60 samples, 0.67 passes over its pool of 90, but mixture.max_passes is 0.5",
            "domain 'medicine' needs 24 samples, 0.60 passes over its pool of 40, but mixture.max_passes is 0.5",
            "domain 'code' needs 36 samples, 1.44 passes over its pool of 25, but mixture.max_passes is 0.5",
        ],
    ),
    "samples larger than a shard": (
        {"mixture": {"shard_bytes": 1024}, "most_tokens": 400},
        MixtureError,
        [
            "the largest sample of 'law' takes ",
            " bytes, more than mixture.shard_bytes (1,024) can hold: raise it",
            "the largest sample of 'code' takes ",
        ],
    ),
    "a sum of 0.97": (
        {"weights": {"law": 0.5, "medicine": 0.2, "code": 0.27}},
        DamageError,
        ["epoch-0001.json is not a valid weights", "weights sum to 0.97, expected 1 (within 1e-9)"],
    ),
    "weights outside [0, 1]": (
        {"weights": {"law": 1.5, "medicine": -0.5, "code": float("nan")}},
        DamageError,
        [
            "weights.law: Input should be less than or equal to 1 (found 1.5)",
            "weights.medicine: Input should be greater than or equal to 0 (found -0.5)",
            "weights.code: Input should be a finite number",
        ],
    ),
    "unknown and missing domains": (
        {"weights": {"law": 0.5, "art": 0.2, "music": 0.3}},
        MixtureError,
        [
            "domain 'art' has a weight but no pool: build its pool",
            "domain 'code' has a pool but no weight: give it one",
            "domain 'medicine' has a pool but no weight: give it one",
            "domain 'music' has a weight but no pool: build its pool",
        ],
    ),
    "weights of another epoch": (
        {"weights": SHARES, "weights_epoch": 2},
        MixtureError,
        ["epoch-0001.json: says it is for epoch 2, expected 1: correct it"],
    ),
    "a pool that was never built": ({"remove": "code"}, MissingError, ["pool of 'code' not found"]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_mixture_is_refused_before_anything_is_written(tmp_path, case):
    case, error, sentences = IMPOSSIBLE[case]
    config = run_of(tmp_path, case.get("sizes", SIZES), mixture=case.get("mixture", {}))
    run = run_folder(config)
    if "weights" in case:
        run.weights(1).write_text(json.dumps({"epoch": case.get("weights_epoch", 1), "weights": case["weights"]}))
    if "most_tokens" in case:
        for name in SIZES:
            shutil.rmtree(run.pool(name))
            write_pool(run.pool(name), name, list(samples(name, 9, case["most_tokens"])))
    if "remove" in case:
        shutil.rmtree(run.pool(case["remove"]))
    before = stamps(tmp_path)
    with pytest.raises(error) as refusal:
        compile_epoch(config, 1)
    assert [sentence for sentence in sentences if sentence not in str(refusal.value)] == []
    assert stamps(tmp_path) == before


def test_missing_weights_are_asked_for_by_path(tmp_path):
    config = run_of(tmp_path)
    compile_epoch(config, 1)
    expected = (
        f"weights for epoch 2 not found ({tmp_path}/run/weights/epoch-0002.json): "
        "train epoch 1 first, or write the file by hand"
    )
    with pytest.raises(MissingError, match=f"^{re.escape(expected)}$"):
        compile_epoch(config, 2)
    run_folder(config).weights(1).unlink()
    with pytest.raises(MissingError, match=r"weights for epoch 1 .*: run `vtmix weights --epoch 1` first, or write"):
        compile_epoch(config, 1)


def test_a_run_folder_that_does_not_exist_is_not_made(tmp_path):
    write_config(tmp_path)
    with pytest.raises(MissingError, match="pool of 'law' not found"):
        compile_epoch(load(tmp_path / "mixture.yaml", run=tmp_path / "typo"), 1)
    assert not (tmp_path / "typo").exists()


def test_the_epoch_before_has_to_be_planned(tmp_path):
    config = run_of(tmp_path)
    write_weights(config, 2)
    with pytest.raises(MissingError, match=r"plan for epoch 1 not found .*: compile epoch 1 first"):
        compile_epoch(config, 2)


def overstate(folder):
    manifest = json.loads((folder / "pool.json").read_text())
    manifest["samples"] += 1
    manifest["parts"][0]["samples"] += 1
    (folder / "pool.json").write_text(json.dumps(manifest))


def scramble(folder):
    path = folder / "part-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))


def displace(folder):
    """Moves the end of a part's last sample beyond the part's data: Arrow's own offsets lie."""
    part = PoolManifest.read(folder / "pool.json", "").parts[1]
    ends = np.cumsum([len(mds.encode_sample(sample)) for sample in samples("law", 90)][-part.samples :])
    raw = (folder / part.name).read_bytes()
    true, false = ends[-3:].tobytes(), (ends[-3:] + np.array([0, 0, 9000])).tobytes()
    assert raw.count(true) == 1
    (folder / part.name).write_bytes(raw.replace(true, false))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: os.truncate(folder / "part-00000.arrow", 999), "has 999 bytes, pool.json says"),
        (lambda folder: (folder / "part-00001.arrow").unlink(), "part-00001.arrow is missing"),
        (scramble, "part-00000.arrow: not readable as Arrow"),
        (overstate, "its parts hold fewer samples than pool.json says"),
        (displace, "a part is damaged"),
    ],
)
def test_a_damaged_pool_is_refused_by_name_and_publishes_nothing(tmp_path, damage, sentence):
    config = run_of(tmp_path, samples_per_epoch=200)
    damage(run_folder(config).pool("law"))
    with pytest.raises(DamageError) as refusal:
        compile_epoch(config, 1)
    assert sentence in str(refusal.value)
    assert str(run_folder(config).path) in str(refusal.value)
    assert not run_folder(config).mixture(1).exists()


# Shares of tokens


@pytest.mark.parametrize("parts", [1, 5])
def test_a_pool_measures_any_window_as_walking_there_does(tmp_path, parts):
    content = list(samples("law", 23))
    write_pool(tmp_path / "law", "law", content, parts=parts)
    pool = pools.open_pool(tmp_path / "law")
    tokens = [len(sample["input_ids"]) for sample in content]
    for position, count in ((0, 0), (0, 23), (22, 1), (5, 30), (46, 3), (90, 70)):
        walked = [content[place % 23] for place in range(position, position + count)]
        assert pool.measured(position, count, "tokens") == sum(len(sample["input_ids"]) for sample in walked)
        assert pool.measured(position, count, "sample_bytes") == sum(
            len(mds.encode_sample(sample)) for sample in walked
        )
    for position in (0, 7, 60):
        sums = np.cumsum([0, *(tokens[place % 23] for place in range(position, position + 60))])
        for amount in range(0, int(sums[-2]), 13):
            count = pool.nearest(position, amount, "tokens")
            assert abs(sums[count] - amount) == np.abs(sums - amount).min()


def test_an_epoch_by_tokens_holds_its_weights_as_shares_of_tokens(tmp_path):
    config = run_of(tmp_path, samples_per_epoch=600, mixture={"unit": "tokens", "shard_bytes": 8192})
    manifest, _ = compile_epoch(config, 1)
    assert manifest.samples == sum(domain.samples for domain in manifest.domains.values()) == 600
    plan = Plan.read(run_folder(config).plan(1), "")
    for name, domain in manifest.domains.items():
        assert domain.tokens / manifest.tokens == pytest.approx(SHARES[name], abs=40 / manifest.tokens)
        assert (domain.tokens, domain.response_tokens) == (
            plan.domains[name].tokens,
            plan.domains[name].response_tokens,
        )
    require_intact(run_folder(config).mixture(1))


# Compression


@pytest.mark.parametrize("compression", ["zstd", "zstd:1"])
def test_streaming_dataset_reads_compressed_shards_like_others(tmp_path, compression):
    from streaming import MDSWriter, StreamingDataset

    plain, small = (
        run_of(tmp_path / name, mixture={"shard_bytes": 8192, "compression": value})
        for name, value in (("plain", None), ("small", compression))
    )
    for config in (plain, small):
        compile_epoch(config, 1)
    folder = run_folder(small).mixture(1)
    require_intact(folder)
    expected = list(mds.Samples(run_folder(plain).mixture(1)))
    found = StreamingDataset(
        remote=str(folder), local=str(tmp_path / "cache"), shuffle=False, num_canonical_nodes=1, batch_size=1
    )
    assert [sample["sample_id"] for sample in found] == [sample["sample_id"] for sample in expected]
    with MDSWriter(
        out=str(tmp_path / "theirs"), columns=dict(mds.COLUMNS), size_limit=8192, compression=compression
    ) as writer:
        writer.write(expected[0])
    theirs = json.loads((tmp_path / "theirs" / "index.json").read_text())["shards"][0]
    ours = json.loads((folder / "index.json").read_text())["shards"][0]
    assert theirs.keys() == ours.keys()
    sizes = ("raw_data", "zip_data", "samples")
    assert {k: v for k, v in theirs.items() if k not in sizes} == {k: v for k, v in ours.items() if k not in sizes}
    assert theirs["zip_data"]["basename"] == ours["zip_data"]["basename"] == "shard.00000.mds.zstd"


def test_an_expanded_shard_is_what_is_written_without_compression(tmp_path):
    config = run_of(tmp_path, mixture={"shard_bytes": 8192, "compression": "zstd:1"})
    manifest, _ = compile_epoch(config, 1)
    _, layout = made_from(manifest)
    file = manifest.files[1]
    whole = layout.expand((run_folder(config).mixture(1) / file.name).read_bytes(), file.raw_bytes)
    assert len(whole) == file.raw_bytes > file.bytes
    plain = run_of(tmp_path / "plain")
    compile_epoch(plain, 1)
    other = (run_folder(plain).mixture(1) / mds.shard_name(0)).read_bytes()
    assert whole.replace(b'"compression": "zstd:1"', b'"compression": null')[-1000:] == other[-1000:]


# The command


def test_a_dry_run_prints_counts_and_the_fingerprint_and_writes_nothing(tmp_path):
    config = run_of(tmp_path)
    before = stamps(tmp_path)
    dry = python_m_compile("--epoch", 1, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert stamps(tmp_path) == before
    assert "epoch 1: 120 samples in " in dry.stdout
    law = next(line.split() for line in dry.stdout.splitlines() if line.split()[:1] == ["law"])
    assert law[:4] == ["law", "0.5000", "60", "50.00%"]
    manifest, _ = compile_epoch(config, 1)
    assert f"fingerprint {manifest.fingerprint_of_inputs}" in dry.stdout


def test_refusals_are_one_error_and_an_exit_code(tmp_path):
    run_of(tmp_path)
    (tmp_path / "bad.yaml").write_text("epocs: 3\n")
    for arguments, code, sentence in (
        (["--epoch", "2"], 1, "error: weights for epoch 2 not found"),
        (["--epoch", "1", "--config", "bad.yaml"], 2, "error: bad.yaml: "),
        (["--epoch", "0"], 2, "argument --epoch: expected 1 or more, found 0"),
        (["--epoch", "1", "--workers", "-1"], 2, "argument --workers: expected 1 or more, found -1"),
    ):
        done = python_m_compile(*arguments, cwd=tmp_path)
        assert done.returncode == code
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


NEEDLESS = ["torch", "ray", "transformers", "streaming", "polars", "pandas", "pyarrow.parquet"]


def test_a_compile_loads_no_library_it_does_not_need(tmp_path):
    run_of(tmp_path)
    script = (
        "import json, sys\nfrom vtmix.compile import main\nmain(['--epoch', '1'])\n"
        f"print(json.dumps([name for name in {NEEDLESS} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
