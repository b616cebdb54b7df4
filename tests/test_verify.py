"""No byte of a mixture changes unseen: verify names the file and the samples, and training refuses to start on it."""

import contextlib
import copy
import json
import os
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
from handmade import run_of, write_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtmix import loop, mds
from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch, open_pools
from vtmix.config import load
from vtmix.errors import DamageError, MissingError, VtmixError
from vtmix.verify import open_manifest, require_intact, verify

EPOCH = "epoch-0001"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with two epochs of four shards or so; copy it before changing it."""
    folder = tmp_path_factory.mktemp("intact")
    config = run_of(folder, samples_per_epoch=40, mixture={"shard_bytes": 4096})
    write_weights(config, 2)
    compile_epoch(config, 1)
    compile_epoch(config, 2)
    assert len(list(run_folder(config).mixture(1).glob("*.mds"))) >= 3
    return folder


@pytest.fixture
def config(intact, tmp_path):
    """A copy of that run, to be damaged."""
    return load(shutil.copytree(intact, tmp_path / "copy") / "mixture.yaml")


def findings(config, epoch=1):
    run = run_folder(config)
    return verify(run.mixture(epoch), open_pools(config))


def regions(folder, name):
    """Every region of a shard with its bounds, read from the file by the format's own definition."""
    raw = (folder / name).read_bytes()
    count = int.from_bytes(raw[:4], "little")
    offsets = np.frombuffer(raw, np.uint32, count + 1, offset=4).tolist()
    yield "sample count", 0, 4
    yield "offset table", 4, 4 + 4 * (count + 1)
    yield "header", 4 + 4 * (count + 1), offsets[0]
    for number, (begin, end) in enumerate(pairwise(offsets)):
        identity = mds.decode_sample(raw[begin:end])["sample_id"]
        yield f"sample {identity} (number {number} of the shard)", begin, end


def test_an_intact_mixture_has_no_findings(config):
    assert findings(config) == []
    assert loop.mixture(config, 1).manifest == open_manifest(run_folder(config).mixture(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An epoch so small that every byte of it can be changed in turn."""
    config = run_of(tmp_path_factory.mktemp("tiny"), samples_per_epoch=4, mixture={"shard_bytes": 1024})
    compile_epoch(config, 1)
    assert len(list(run_folder(config).mixture(1).glob("*.mds"))) == 2
    return config


def test_every_flipped_byte_is_found_and_its_sample_named_and_training_refuses_it(tiny):
    folder = run_folder(tiny).mixture(1)
    pools, flips = open_pools(tiny), 0
    for file in open_manifest(folder).files:
        path = folder / file.name
        whole = path.read_bytes()
        places = [("", 0, len(whole))] if file.name == mds.INDEX else list(regions(folder, file.name))
        for what, begin, end in places:
            for position in range(begin, end):
                path.write_bytes(
                    whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
                )
                first, *rest = verify(folder, pools)
                assert first.startswith(f"{path}: its bytes have changed (digest ")
                assert rest == ([f"{path}: {what} changed"] if what else [])
                if position % 5 == 0:
                    with pytest.raises(DamageError, match=rf"{file.name}: its bytes have changed"):
                        require_intact(folder)
                flips += 1
        path.write_bytes(whole)
    assert flips > 1500
    assert verify(folder, pools) == []


def test_every_byte_of_the_manifest_counts(config):
    """Of what is stated once only, the response tokens, a change shows in the digest that names the mixture."""
    folder = run_folder(config).mixture(1)
    path = folder / "manifest.json"
    whole, digest = path.read_bytes(), loop.mixture(config, 1).digest
    unseen = []
    for position in range(len(whole)):
        changed = whole[:position] + bytes([whole[position] ^ 1 << position % 7]) + whole[position + 1 :]
        path.write_bytes(changed)
        try:
            assert require_intact(folder).digest() != digest or changed.split() == whole.split()
        except DamageError:
            continue
        unseen.append(whole[whole.rfind(b"\n", 0, position) : whole.find(b"\n", position)])
    assert {line.strip().partition(b":")[0] for line in unseen} <= {b'"response_tokens"'}


def test_every_truncation_is_found_and_the_samples_it_cost_are_named(tiny):
    folder = run_folder(tiny).mixture(1)
    pools = open_pools(tiny)
    for file in open_manifest(folder).files:
        path = folder / file.name
        whole = path.read_bytes()
        cut = [] if file.name == mds.INDEX else list(regions(folder, file.name))
        for kept in range(len(whole)):
            path.write_bytes(whole[:kept])
            first, *rest = verify(folder, pools)
            assert first == f"{path}: has {kept:,} bytes, expected {len(whole):,}"
            assert rest == [f"{path}: {what} changed" for what, _, end in cut if end > kept]
        path.write_bytes(whole)


def test_bytes_too_many_are_found(config):
    path = run_folder(config).mixture(1) / mds.shard_name(1)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    assert findings(config) == [
        f"{path}: has {size + 4:,} bytes, expected {size:,}",
        f"{path}: 4 bytes too many at the end",
    ]


@pytest.mark.parametrize("name", ["shard.00001.mds", "index.json"])
def test_a_missing_file_is_named(config, name):
    path = run_folder(config).mixture(1) / name
    path.unlink()
    assert findings(config) == [f"{path}: is missing"]


def test_an_extra_file_is_named(config):
    folder = run_folder(config).mixture(1)
    shutil.copy(folder / mds.shard_name(0), folder / mds.shard_name(99))
    assert findings(config) == [f"{folder}/shard.00099.mds: is no file of this mixture: remove it"]


def test_swapped_shards_are_named(config):
    folder = run_folder(config).mixture(1)
    one, other = folder / mds.shard_name(0), folder / mds.shard_name(1)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    for path in (one, other):
        assert any(line.startswith(f"{path}: ") for line in findings(config))


def test_a_shard_of_another_epoch_is_named(config):
    run = run_folder(config)
    path = run.mixture(2) / mds.shard_name(0)
    shutil.copy(run.mixture(1) / mds.shard_name(0), path)
    assert findings(config, 2)[0].startswith(f"{path}: ")


def test_a_folder_of_another_epoch_is_refused(config):
    run = run_folder(config)
    shutil.rmtree(run.mixture(2))
    run.mixture(1).rename(run.mixture(2))
    with pytest.raises(DamageError, match="it is the manifest of epoch 1, which does not belong to epoch 2"):
        loop.mixture(config, 2)


@pytest.mark.parametrize("name", ["shard.00001.mds", "index.json", "manifest.json"])
@pytest.mark.parametrize("make", [os.symlink, lambda _, path: os.mkfifo(path), lambda _, path: path.mkdir()])
def test_what_is_no_regular_file_is_named_and_never_opened(config, tmp_path, name, make):
    path = run_folder(config).mixture(1) / name
    path.rename(tmp_path / "outside")
    make(tmp_path / "outside", path)
    with pytest.raises(DamageError, match=rf"{name}: is not a regular file"):
        require_intact(path.parent)


def rewrite(config, change):
    """Changes a manifest as a person with an editor would, keeping what it says of its inputs true."""
    path = run_folder(config).mixture(1) / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../shard.00001.mds",
        "/etc/passwd",
        "shard.00001.mds\x00",
        "shard.1.mds",
        "shard.٠٠٠٠١.mds",
        "",
        ".",
        "index.json",
    ],
)
def test_a_manifest_that_names_other_files_is_refused_before_they_are_touched(config, name):
    def hostile(content):
        content["files"][2]["name"] = name

    path = rewrite(config, hostile)
    with pytest.raises(DamageError) as refusal:
        require_intact(path.parent)
    assert str(refusal.value).startswith(f"{path}: {name!r} is no file of a mixture, or out of order")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(samples=41), "it says samples 41, which should be 40"),
        (lambda content: content.update(tokens=1), "it says tokens 1, which should be "),
        (lambda content: content.update(bytes=1), "it says bytes 1, which should be "),
        (lambda content: content["files"].pop(), "it says files 4, which should be 5"),
        (lambda content: content["domains"]["law"].update(samples=19), "its share of 'law' (weight, samples, proport"),
        (lambda content: content["domains"]["law"].update(weight=0.51), "is not the planned (0.5, 20, 0.5)"),
        (lambda content: content["domains"].pop("law"), "its share of 'law'"),
        (lambda content: content["inputs"]["plan"].update(seed=1), "its inputs do not have the fingerprint it gives"),
        (lambda content: content.update(inputs=None), "its inputs are not those of a mixture"),
        (lambda content: content.update(inputs={"plan": []}), "its inputs are not those of a mixture"),
        (lambda content: content.update(files=[]), "is no file of a mixture"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(config, change, sentence):
    path = rewrite(config, change)
    with pytest.raises(DamageError) as refusal:
        require_intact(path.parent)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"epoch": 1e999}', b"null"])
def test_a_manifest_that_is_none_is_refused(config, content):
    path = run_folder(config).mixture(1) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(DamageError, match=r"manifest\.json is not a valid manifest"):
        require_intact(path.parent)


def test_an_index_that_leads_elsewhere_is_refused_though_the_manifest_vouches_for_it(config):
    folder = run_folder(config).mixture(1)
    index = json.loads((folder / mds.INDEX).read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../../outside"
    raw = json.dumps(index, sort_keys=True).encode()
    (folder / mds.INDEX).write_bytes(raw)

    def vouch(content):
        import hashlib

        content["files"][0].update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())

    rewrite(config, vouch)
    with pytest.raises(DamageError, match=r"index\.json: is not the index of these shards"):
        require_intact(folder)


def test_a_mixture_that_was_never_compiled_is_asked_for(config):
    with pytest.raises(MissingError, match=r"mixture for epoch 3 not found .*python -m vtmix\.compile --epoch 3`"):
        loop.mixture(config, 3)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra"])
def test_training_refuses_to_start_on_a_damaged_mixture(config, damage):
    folder = run_folder(config).mixture(1)
    path = folder / mds.shard_name(1)
    if damage == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path = folder / "extra"
        path.touch()
    with pytest.raises(DamageError) as refusal:
        loop.mixture(config, 1)
    assert str(path) in str(refusal.value)
    assert f"move {folder} away and compile the epoch again" in str(refusal.value)


def test_a_damaged_mixture_moved_away_is_compiled_again_to_the_same_bytes(config, tmp_path):
    folder = run_folder(config).mixture(1)
    digest = loop.mixture(config, 1).digest
    (folder / mds.shard_name(0)).write_bytes(b"")
    folder.rename(tmp_path / "damaged")
    compile_epoch(config, 1)
    assert loop.mixture(config, 1).digest == digest


def test_samples_are_named_from_the_manifests_own_plan(config):
    run = run_folder(config)
    path = run.mixture(1) / mds.shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with_plan = findings(config)
    assert verify(run.mixture(1), open_pools(config)) == with_plan
    assert "sample " in with_plan[1]


def test_where_the_pools_are_gone_or_changed_the_file_is_named_all_the_same(config):
    run = run_folder(config)
    path = run.mixture(1) / mds.shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    known = open_pools(config)
    first = f"{path}: its bytes have changed"
    assert [line[: len(first)] for line in verify(run.mixture(1), None)][:1] == [first]
    shutil.rmtree(run.pool("law"))
    found = verify(run.mixture(1), known)
    assert found[0].startswith(first)
    assert found[1].startswith(f"{path}: the samples cannot be named: ")


def test_a_damaged_compressed_shard_is_named_with_its_samples_or_as_lost(tmp_path):
    config = run_of(tmp_path, mixture={"shard_bytes": 8192, "compression": "zstd"})
    compile_epoch(config, 1)
    folder = run_folder(config).mixture(1)
    path = folder / "shard.00001.mds.zstd"
    original = path.read_bytes()
    assert verify(folder, open_pools(config)) == []
    for position in range(0, len(original), len(original) // 40):
        path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        lines = verify(folder, open_pools(config))
        assert lines[0].startswith(f"{path}: its bytes have changed")
        assert all("cannot be expanded" in line or "changed" in line for line in lines[1:])


# Hostile manifests and indices: whatever they say, no path outside the mixture is touched, and one error says so


class Touched:
    """The paths that Python opened, listed, removed or renamed while this was on, by its audit events."""

    def __init__(self):
        self.on, self.paths = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.on and event in {"open", "os.remove", "os.rename", "os.rmdir", "os.listdir", "os.scandir", "os.mkdir"}:
            self.paths.append(args[0])

    def __enter__(self):
        self.on, self.paths = True, []
        return self

    def __exit__(self, *_):
        self.on = False


TOUCHED = Touched()
HOSTILE = st.one_of(
    st.sampled_from(["../../outside", "/etc/passwd", "shard.00000.mds\x00", "shard.00001.mds/../../x", ".", "", "~/x"]),
    st.sampled_from([-1, 2**63, 2**200, 0.5, 1e308, True, None, [], {}, "x" * 10_000, [[[[[]]]]]]),
    st.text(max_size=20),
    st.integers(),
)


def leaves(value, path=()):
    """Every place in nested JSON, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from leaves(child, (*path, key))


def put(value, path, new):
    """The value with another one in one place; at its root, the other one."""
    if not path:
        return copy.deepcopy(new)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = copy.deepcopy(new)
    return value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_hostile_manifest_or_index_leads_nowhere_and_is_one_error(tiny, data):
    folder = run_folder(tiny).mixture(1)
    name = data.draw(st.sampled_from(["manifest.json", mds.INDEX]))
    path = folder / name
    whole = path.read_bytes()
    content = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(leaves(content))
        content = put(content, data.draw(st.sampled_from(places)), data.draw(HOSTILE))
    raw = data.draw(
        st.sampled_from(
            [
                json.dumps(content).encode(),
                json.dumps(content).replace(": 1,", ": NaN,").encode(),
                json.dumps(content)[:-1].encode() + b', "files": []}',
                b"[" * 10**6,
            ]
        )
    )
    pools = open_pools(tiny)
    path.write_bytes(raw)
    try:
        with TOUCHED as touched, contextlib.suppress(VtmixError):
            require_intact(folder)
        with touched, contextlib.suppress(VtmixError):
            verify(folder, pools)
    finally:
        path.write_bytes(whole)
    allowed = (str(folder), str(run_folder(tiny).pools), "/proc", sys.prefix, sys.base_prefix)
    assert [
        found
        for found in touched.paths
        if isinstance(found, (str, bytes)) and not os.fsdecode(found).startswith(allowed)
    ] == []
