"""A packed epoch holds exactly the planned samples, in sequences of fixed length, in the bytes MosaicML would write."""

import json
import os
import shutil
from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from handmade import SHARES, SIZES, run_of, samples, tree, write_config, write_pool

from vtmix import mds
from vtmix.artifacts import Plan, run_folder
from vtmix.compile import compile_epoch, main, open_pools
from vtmix.config import load
from vtmix.errors import ConfigError, ConflictError, DamageError, MixtureError
from vtmix.plan import shard_bounds
from vtmix.verify import open_manifest, require_intact, verify

LENGTH = 64
SETTINGS = {"encoding": {"max_length": 40}, "mixture": {"shard_bytes": 8192, "packing": {"length": LENGTH}}}
KNOWN = {sample["sample_id"]: sample for name, size in SIZES.items() for sample in samples(name, size)}
GOLDEN = {
    "index.json": "a649c38f62705bbdb0bb63d284b76bbf5ae7c560576c7964dc34ed4f55927fd8",
    "shard.00000.mds": "586fb312ef51c7c86fa5c79493d357fbc4c62d259593132a5b7bd2b37036ba3a",
    "shard.00001.mds": "1a1fc862ae33763ce6352139f749698e148913b2194fbbbf48255eec7d9e5f05",
}


def packed_run(folder, *arguments, **mixture):
    return run_of(folder, *arguments, **(SETTINGS | {"mixture": SETTINGS["mixture"] | mixture}))


def with_packing(**packing):
    return {"packing": {"length": LENGTH, **packing}}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with a packed epoch; copy it before changing it."""
    folder = tmp_path_factory.mktemp("intact")
    compile_epoch(packed_run(folder), 1)
    return folder


@pytest.fixture
def config(intact, tmp_path):
    """A copy of that run."""
    return load(shutil.copytree(intact, tmp_path / "copy") / "mixture.yaml")


def members(sequence):
    """Each member of a sequence: domain, id, token ids, labels, positions."""
    edges = list(accumulate(sequence["lengths"].tolist(), initial=0))
    names = zip(sequence["domains"].split(","), sequence["sample_ids"].split(","), pairwise(edges), strict=True)
    for domain, identity, (start, stop) in names:
        yield domain, identity, *(sequence[name][start:stop] for name in ("input_ids", "labels", "position_ids"))


def test_every_planned_sample_stands_in_one_sequence_of_its_shard(config, tmp_path):
    unpacked = run_of(tmp_path / "unpacked")
    run = run_folder(unpacked)
    compile_epoch(unpacked, 1)
    planned = [sample["sample_id"] for sample in mds.Samples(run.mixture(1))]

    run = run_folder(config)
    sequences = iter(mds.Samples(run.mixture(1)))
    plan = Plan.read(run.plan(1), "")
    for (start, stop), file in zip(shard_bounds(plan), open_manifest(run.mixture(1)).files[1:], strict=True):
        found = [",".join(next(sequences)["sample_ids"].split(",")) for _ in range(file.sequences)]
        assert Counter(",".join(found).split(",")) == Counter(planned[start:stop])
    assert next(sequences, None) is None


def test_members_are_their_samples_but_for_the_first_label_and_the_rest_is_padding(config):
    for sequence in mds.Samples(run_folder(config).mixture(1)):
        for domain, identity, input_ids, labels, position_ids in members(sequence):
            expected = KNOWN[identity]
            assert domain == expected["domain"]
            assert input_ids.tolist() == expected["input_ids"].tolist()
            assert labels.tolist() == [-100, *expected["labels"][1:].tolist()]
            assert position_ids.tolist() == list(range(len(input_ids)))
        filled = sequence["lengths"].sum()
        assert {len(sequence[name]) for name in ("input_ids", "labels", "position_ids")} == {LENGTH}
        assert sequence["input_ids"][filled:].tolist() == [0] * (LENGTH - filled)
        assert sequence["labels"][filled:].tolist() == [-100] * (LENGTH - filled)
        assert sequence["position_ids"][filled:].tolist() == list(range(LENGTH - filled))


def test_a_label_of_a_first_token_is_left_out(tmp_path):
    config = packed_run(tmp_path, {"law": 10}, {"law": 1.0})
    folder = run_folder(config).pool("law")
    shutil.rmtree(folder)
    write_pool(folder, "law", [{**sample, "labels": sample["input_ids"]} for sample in samples("law", 10)])
    compile_epoch(config, 1)
    for sequence in mds.Samples(run_folder(config).mixture(1)):
        assert all(labels[0] == -100 for _, _, _, labels, _ in members(sequence))


@pytest.mark.parametrize(
    "settings", [{}, {"shard_bytes": 1 << 20}, {"compression": "zstd:3"}, with_packing(multiple=4)]
)
def test_streaming_dataset_reads_what_mds_samples_reads_and_mdswriter_would_write(tmp_path, settings):
    from streaming import MDSWriter, StreamingDataset

    config = packed_run(tmp_path, **settings)
    manifest, _ = compile_epoch(config, 1)
    folder, theirs, compression = run_folder(config).mixture(1), tmp_path / "theirs", settings.get("compression")
    dataset = StreamingDataset(local=str(shutil.copytree(folder, tmp_path / "read")), shuffle=False, batch_size=1)
    limit = config.mixture.shard_bytes
    columns = dict(mds.PACKED_COLUMNS)
    with MDSWriter(out=str(theirs), columns=columns, size_limit=limit, compression=compression) as writer:
        number = 0
        for file in manifest.files[1:]:
            if number:  # as its write() does when a shard is full
                writer.flush_shard()
                writer._reset_cache()
            for _ in range(file.sequences):
                writer.write(dataset[number])
                number += 1
    assert number == len(dataset) == manifest.packing.sequences
    for file in manifest.files:
        if compression is None:
            assert (folder / file.name).read_bytes() == (theirs / file.name).read_bytes(), file.name
    if compression is None:
        for mine, read in zip(mds.Samples(folder), map(dataset.__getitem__, range(len(dataset))), strict=True):
            assert all(np.array_equal(mine[name], read[name]) for name in mds.PACKED_COLUMNS)


def test_golden_bytes(config):
    found = tree(run_folder(config).mixture(1))
    assert {name: found[name] for name in GOLDEN} == GOLDEN


def test_workers_and_the_order_of_the_domains_change_no_byte(config, tmp_path):
    backwards = dict(reversed(SIZES.items()))
    other = packed_run(tmp_path / "other", backwards, {domain: SHARES[domain] for domain in backwards})
    compile_epoch(other, 1, workers=1)
    found, expected = (tree(run_folder(one).mixture(1)) for one in (other, config))
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


@pytest.mark.parametrize("tokens", [2, 9, LENGTH // 2, LENGTH // 2 + 1, LENGTH])
@pytest.mark.parametrize("settings", [{}, with_packing(multiple=4)])
def test_no_shard_exceeds_shard_bytes_however_badly_samples_fit(tmp_path, tokens, settings):
    config = packed_run(tmp_path, {"law": 3}, {"law": 1.0}, **settings)
    folder = run_folder(config).pool("law")
    shutil.rmtree(folder)
    ids = np.arange(tokens, dtype=np.int32)
    content = [mds.Sample(domain="law", input_ids=ids, labels=ids, sample_id=name) for name in ("a", "b", "c" * 99)]
    write_pool(folder, "law", content)
    manifest, _ = compile_epoch(config, 1)
    assert max(file.bytes for file in manifest.files[1:]) <= 8192
    require_intact(run_folder(config).mixture(1))


def test_the_manifest_and_the_command_count_sequences(config, capsys):
    run = run_folder(config)
    manifest = open_manifest(run.mixture(1))
    found = mds.Samples(run.mixture(1))
    assert manifest.samples == 120
    assert manifest.packing.sequences == len(found) == sum(file.sequences for file in manifest.files[1:])
    tokens = sum(int(sequence["lengths"].sum()) for sequence in found)
    assert manifest.tokens == tokens
    assert manifest.packing.utilisation == tokens / (len(found) * LENGTH)
    assert main(["--config", str(config.root / "mixture.yaml"), "--epoch", "1"]) == 0
    assert f"{len(found)} sequences {tokens / (len(found) * LENGTH):.1%} full" in capsys.readouterr().out


def test_counts_positions_and_arrangement_do_not_depend_on_packing(config, tmp_path):
    unpacked = run_of(tmp_path / "unpacked")
    compile_epoch(unpacked, 1)
    one, other = (Plan.read(run_folder(each).plan(1), "") for each in (config, unpacked))
    assert {**one.model_dump(), "shards": 0, "inputs": 0} == {**other.model_dump(), "shards": 0, "inputs": 0}


def test_a_shards_sequences_are_a_multiple_of_what_was_asked_for(tmp_path):
    config = packed_run(tmp_path, **with_packing(multiple=4))
    manifest, _ = compile_epoch(config, 1)
    found = mds.Samples(run_folder(config).mixture(1))
    assert all(file.sequences % 4 == 0 for file in manifest.files[1:])
    empty = [sequence for sequence in found if not sequence["lengths"].sum()]
    assert empty
    assert {(sequence["sample_ids"], sequence["domains"]) for sequence in empty} == {("", "")}
    assert {sequence["position_ids"].tolist() == list(range(LENGTH)) for sequence in empty} == {True}
    assert sum(len(sequence["lengths"]) for sequence in found) == 120 + len(empty)


# Refusals


def test_samples_that_may_be_longer_than_a_sequence_are_a_mistake_in_the_configuration(tmp_path):
    path = write_config(tmp_path, encoding={"max_length": 65}, mixture={"packing": {"length": 64}})
    with pytest.raises(ConfigError, match=r"encoding\.max_length 65 exceeds mixture\.packing\.length 64"):
        load(path)


def test_a_sample_of_a_pool_that_is_longer_than_a_sequence_is_named_by_its_domain(tmp_path):
    config = packed_run(tmp_path)
    folder = run_folder(config).pool("code")
    shutil.rmtree(folder)
    write_pool(folder, "code", list(samples("code", 25, 80)))
    with pytest.raises(MixtureError, match=r"the pool of 'code' holds a sample of \d+ tokens, more than mixture\.pack"):
        compile_epoch(config, 1)
    assert not run_folder(config).mixture(1).exists()


def test_a_sequence_that_is_larger_than_a_shard_is_refused_before_anything_is_written(tmp_path):
    config = packed_run(tmp_path, shard_bytes=1024)
    with pytest.raises(MixtureError, match=r"the largest sample of 'law' .* packed .* mixture\.shard_bytes \(1,024\)"):
        compile_epoch(config, 1)
    assert not run_folder(config).plan(1).exists()


def test_an_epoch_of_other_packing_is_refused_by_name(config):
    changed = load(
        write_config(config.root, **SETTINGS | {"mixture": {"shard_bytes": 8192, **with_packing(multiple=2)}})
    )
    with pytest.raises(ConflictError, match=r"packing\.multiple was 1, is now 2"):
        compile_epoch(changed, 1)


# Damage


def test_a_flipped_byte_names_the_samples_of_its_sequence(config):
    folder = run_folder(config).mixture(1)
    path = folder / mds.shard_name(1)
    whole = path.read_bytes()
    count = int.from_bytes(whole[:4], "little")
    offsets = np.frombuffer(whole, np.uint32, count + 1, offset=4).tolist()
    for number, (begin, end) in enumerate(pairwise(offsets)):
        changed = bytearray(whole)
        changed[(begin + end) // 2] ^= 0xFF
        path.write_bytes(changed)
        identities = mds.decode_sample(whole[begin:end], mds.PACKED_COLUMNS)["sample_ids"]
        _, found = verify(folder, open_pools(config))
        assert found == f"{path}: samples {identities} (number {number} of the shard) changed"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["packing"].update(sequences=1),
        lambda content: content["packing"].update(utilisation=0.5),
        lambda content: content.update(packing=None),
        lambda content: content["files"][1].update(sequences=1),
        lambda content: [file.update(sequences=0) for file in content["files"][1:]],
        lambda content: content["files"][1].update(sequences=10**30),
        lambda content: content["files"][1].update(sequences=None),
        lambda content: content["files"][0].update(sequences=1),
        lambda content: content["inputs"].update(packing=None),
    ],
)
def test_a_manifest_that_contradicts_itself_about_its_sequences_is_refused(config, change):
    path = run_folder(config).mixture(1) / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamageError, match=r"sequences|fingerprint"):
        require_intact(path.parent)


def test_sequences_moved_from_one_shard_to_another_do_not_fit_the_index(config):
    path = run_folder(config).mixture(1) / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][1]["sequences"] += 1
    content["files"][2]["sequences"] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(DamageError, match=r"index\.json: is not the index of these shards"):
        require_intact(path.parent)


def test_a_damaged_pool_is_refused_and_publishes_nothing(tmp_path):
    config = packed_run(tmp_path)
    part = run_folder(config).pool("law") / "part-00000.arrow"
    os.truncate(part, 999)
    with pytest.raises(DamageError, match="has 999 bytes"):
        compile_epoch(config, 1)
    assert not run_folder(config).mixture(1).exists()
