"""What vtmix writes is MDS: byte for byte what MosaicML's own writer makes, and its reader and ours read the same."""

import contextlib
import json
from itertools import pairwise

import numpy as np
import pytest
from handmade import run_of, samples
from hypothesis import given
from hypothesis import strategies as st

from vtmix import mds
from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch
from vtmix.errors import DamageError, MissingError, MixtureError

EDGES = (1, 2, 255, 256, 257, 65_535, 65_536)
"""Lengths of arrays around those where their length takes another byte."""


def sample_of(length, domain="law", sample_id="0123abcd"):
    values = np.arange(length, dtype=np.int32) * 7919
    return mds.Sample(domain=domain, input_ids=values, labels=-values, sample_id=sample_id)


def same(one, other):
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in mds.COLUMNS)


lengths = st.one_of(st.sampled_from(EDGES), st.integers(0, 600))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(lengths, texts, texts)
def test_a_sample_is_decoded_as_it_was_encoded(length, domain, sample_id):
    sample = sample_of(length, domain, sample_id)
    assert same(mds.decode_sample(mds.encode_sample(sample)), sample)


@pytest.mark.parametrize("length", EDGES)
def test_an_encoded_sample_equals_the_one_mosaicml_encodes(length, tmp_path):
    from streaming import MDSWriter

    sample = sample_of(length, "медицина")
    with MDSWriter(out=str(tmp_path / "out"), columns=dict(mds.COLUMNS)) as writer:
        assert writer.encode_sample(sample) == mds.encode_sample(sample)
        writer.write(sample)


@pytest.mark.parametrize("length", [0, 3, 300])
def test_a_damaged_sample_is_refused_or_decodes_to_another_one(length):
    sample = sample_of(length)
    encoded = mds.encode_sample(sample)
    for position in range(len(encoded)):
        for bit in range(8):
            damaged = bytearray(encoded)
            damaged[position] ^= 1 << bit
            with contextlib.suppress(DamageError):
                assert not same(mds.decode_sample(bytes(damaged)), sample), (position, bit)


@given(st.integers(0, 40), st.data())
def test_a_truncated_sample_is_refused(length, data):
    encoded = mds.encode_sample(sample_of(length))
    kept = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(DamageError):
        mds.decode_sample(encoded[:kept])


@given(st.lists(st.tuples(lengths, texts, texts), min_size=1, max_size=6))
def test_token_ids_are_found_in_the_bytes_of_samples_without_decoding_them(content):
    encoded = [mds.encode_sample(sample_of(*one)) for one in content]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    tokens, ids, labels = mds.token_spans(data, np.cumsum([0, *map(len, encoded)]))
    assert tokens.tolist() == [length for length, *_ in content]
    for (length, *texts), first, second in zip(content, ids, labels, strict=True):
        expected = sample_of(length, *texts)
        for name, start in (("input_ids", first), ("labels", second)):
            assert np.array_equal(data[start : start + 4 * length].view(np.int32), expected[name])


@given(st.integers(0, 40), st.data())
def test_token_ids_are_not_looked_for_in_samples_whose_sizes_do_not_add_up(length, data):
    encoded = bytearray(mds.encode_sample(sample_of(length)))
    encoded[data.draw(st.integers(0, 15))] ^= 1 << data.draw(st.integers(0, 7))
    kept = data.draw(st.sampled_from([len(encoded), 15]))
    with pytest.raises(DamageError, match="build the pools again"):
        mds.token_spans(np.frombuffer(encoded[:kept], np.uint8), np.array([0, kept]))


@pytest.mark.parametrize("shard_bytes", [1 << 26, 8192])
def test_shards_and_index_equal_those_of_mosaicmls_writer(tmp_path, shard_bytes):
    from streaming import MDSWriter

    config = run_of(tmp_path, mixture={"shard_bytes": shard_bytes})
    manifest, _ = compile_epoch(config, 1)
    folder = run_folder(config).mixture(1)
    content = iter(mds.Samples(folder))
    entries = json.loads((folder / mds.INDEX).read_text())["shards"]
    assert (len(entries) > 3) == (shard_bytes == 8192)
    with MDSWriter(out=str(tmp_path / "theirs"), columns=dict(mds.COLUMNS), size_limit=shard_bytes) as writer:
        for number, entry in enumerate(entries):
            if number:  # as its write() does when a shard is full
                writer.flush_shard()
                writer._reset_cache()
            for _ in range(entry["samples"]):
                writer.write(next(content))
    assert next(content, None) is None
    for file in manifest.files:
        assert (folder / file.name).read_bytes() == (tmp_path / "theirs" / file.name).read_bytes(), file.name


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(1 << 10, (1 << 32) - 1))
def test_a_shards_offsets_lead_to_its_samples(sizes, limit):
    head = mds.Layout(limit).header(np.array(sizes, np.int64))
    assert len(head) == mds.Layout(limit).header_bytes(len(sizes))
    offsets = np.frombuffer(head, np.uint32, len(sizes) + 1, offset=4)
    assert int.from_bytes(head[:4], "little") == len(sizes)
    assert offsets[0] == len(head)
    assert [stop - start for start, stop in pairwise(offsets.tolist())] == sizes


def test_a_shard_of_4_gib_is_refused():
    below = np.array([(1 << 32) - 1 - mds.Layout(1 << 26).header_bytes(1)], np.int64)
    assert np.frombuffer(mds.Layout(1 << 26).header(below), np.uint32, 2, offset=4)[1] == (1 << 32) - 1
    with pytest.raises(MixtureError, match=r"4,294,967,296 bytes exceeds the 4 GiB .* lower mixture\.shard_bytes"):
        mds.Layout(1 << 26).header(below + 1)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_shards_sort_by_their_number_however_many_there_are(numbers):
    names = [mds.shard_name(number) for number in numbers]
    assert sorted(names, key=mds.shard_number) == [mds.shard_name(number) for number in sorted(numbers)]


@pytest.fixture
def folder(tmp_path):
    """Three shards of four samples."""
    content = [mds.encode_sample(sample) for sample in samples("law", 12)]
    sizes = []
    for number in range(3):
        chunk = content[4 * number : 4 * number + 4]
        data = mds.Layout(1 << 26).header(np.array([len(sample) for sample in chunk], np.int64)) + b"".join(chunk)
        (tmp_path / mds.shard_name(number)).write_bytes(data)
        sizes.append(mds.ShardSize(4, len(data)))
    (tmp_path / mds.INDEX).write_bytes(mds.Layout(1 << 26).index(sizes))
    return tmp_path


def test_samples_are_found_by_position_from_either_end_and_by_slices(folder):
    expected = list(samples("law", 12))
    found = mds.Samples(folder)
    assert len(found) == 12
    assert all(same(found[number], expected[number]) for number in range(12))
    assert same(found[-12], expected[0])
    assert [sample["sample_id"] for sample in found[3:11:3]] == ["law-000003", "law-000006", "law-000009"]
    for position in (12, -13):
        with pytest.raises(IndexError, match="of 12"):
            found[position]


def test_a_folder_without_an_index_is_not_complete(tmp_path):
    with pytest.raises(MissingError, match=r"holds no index\.json"):
        mds.Samples(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shards": [{}]}', '{"shards": [{"samples": "x"}]}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / mds.INDEX).write_text(content)
    with pytest.raises(DamageError, match=r"index\.json: is not an index"):
        mds.Samples(tmp_path)


def test_a_shard_that_is_missing_or_cut_is_refused_by_name(folder):
    found = mds.Samples(folder)
    path = folder / mds.shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"shard\.00001\.mds: has [\d,]+ bytes, index\.json says"):
        found[5]
    path.unlink()
    with pytest.raises(DamageError, match=r"shard\.00001\.mds: is missing"):
        found[5]
    assert found[4 - 1]["sample_id"] == "law-000003"
