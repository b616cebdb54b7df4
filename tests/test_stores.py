"""Pools are read from, and mixtures written to, a real S3-compatible server; a manifest is what makes a mixture."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from handmade import SIZES, run_of, tree, write_weights

from vtmix import gc as collector
from vtmix import loop, mds, pool
from vtmix.artifacts import MANIFEST, Manifest, run_folder
from vtmix.compile import compile_epoch, open_pools, store_of
from vtmix.config import load
from vtmix.errors import ConflictError, DamageError, MissingError, VtmixError
from vtmix.stores import Store
from vtmix.verify import verify_store

SERVER = Path(sys.executable).with_name("rclone")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An S3 server on loopback, and the folder in which it keeps its buckets."""
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "bucket").mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"127.0.0.1:{port}"
    log = (folder.parent / "server.log").open("w")
    process = subprocess.Popen(
        [SERVER, "serve", "s3", "--addr", address, "--auth-key", "key,secret", str(folder)], stderr=log
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_REGION": "us-east-1",
        # The server knows no checksums that trail an upload.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "S3_ENDPOINT_URL": f"http://{address}",  # StreamingDataset's name for the same
    }
    before = dict(os.environ)
    os.environ.update(environment)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield folder
    process.terminate()
    process.wait()
    log.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def prefix(served, request):
    """A place of its own for every test."""
    name = str(abs(hash(request.node.name)))
    yield f"s3://bucket/{name}"
    shutil.rmtree(served / "bucket" / name, ignore_errors=True)


def remove(url):
    """Removes one object of the store."""
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3").delete_object(Bucket=bucket, Key=key)


def stored(tmp_path, prefix, **settings):
    """A run whose mixtures stand in the store."""
    return run_of(tmp_path, mixture={"shard_bytes": 8192, "store": prefix, **settings})


def objects(served, prefix):
    return tree(served / "bucket" / prefix.rpartition("/")[2])


def test_a_mixture_in_a_store_holds_the_bytes_of_one_on_disk(tmp_path, served, prefix):
    config, local = stored(tmp_path / "stored", prefix), run_of(tmp_path / "local")
    manifest, fresh = compile_epoch(config, 1)
    compile_epoch(local, 1)
    assert fresh
    assert objects(served, f"{prefix}")
    assert {name.partition("/")[2]: digest for name, digest in objects(served, prefix).items()} == tree(
        run_folder(local).mixture(1)
    )
    assert Manifest.read(run_folder(config).manifest(1), "") == manifest
    assert not run_folder(config).mixture(1).exists()
    assert not list(run_folder(config).mixture(1).parent.glob(".staging-*"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_streaming_dataset_reads_it_by_remote(tmp_path, prefix, compression):
    from streaming import StreamingDataset

    config = stored(tmp_path, prefix, compression=compression)
    compile_epoch(config, 1)
    expected = [sample["sample_id"] for sample in mds.Samples(run_folder(local_twin(tmp_path)).mixture(1))]
    found = StreamingDataset(
        remote=f"{prefix}/epoch-0001",
        local=str(tmp_path / "cache"),
        shuffle=False,
        num_canonical_nodes=1,
        batch_size=1,
    )
    assert [sample["sample_id"] for sample in found] == expected


def local_twin(tmp_path):
    config = run_of(tmp_path / "twin")
    compile_epoch(config, 1)
    return config


def test_a_mixture_that_is_up_to_date_is_not_uploaded_again_even_by_another_run_folder(tmp_path, served, prefix):
    config = stored(tmp_path / "one", prefix)
    compile_epoch(config, 1)
    before = {path: path.stat().st_mtime_ns for path in (served / "bucket").rglob("*") if path.is_file()}
    assert compile_epoch(config, 1)[1] is False
    other = stored(tmp_path / "other", prefix)
    assert compile_epoch(other, 1)[1] is False
    assert run_folder(other).manifest(1).read_bytes() == run_folder(config).manifest(1).read_bytes()
    assert before == {path: path.stat().st_mtime_ns for path in (served / "bucket").rglob("*") if path.is_file()}


def test_another_mixture_in_its_place_is_refused_by_name(tmp_path, prefix):
    compile_epoch(stored(tmp_path / "one", prefix), 1)
    other = load(stored(tmp_path / "other", prefix).root / "mixture.yaml")
    run_folder(other).weights(1).unlink()
    write_weights(other, 1, {"law": 0.2, "medicine": 0.2, "code": 0.6})
    with pytest.raises(ConflictError, match=r"s3://.*manifest\.json was made from other inputs"):
        compile_epoch(other, 1)


def test_killed_at_any_upload_no_reader_takes_what_is_there_for_a_mixture(tmp_path, served, prefix):
    """SIGKILL before the k-th object, for every k; what is there has no index, or all of it is there."""
    config = stored(tmp_path, prefix)
    script = (
        "import os, signal, sys\nfrom vtmix import stores\nfrom vtmix.compile import main\n"
        "from pyarrow import fs\nopened, count = stores._opened, [0]\n"
        "class Files:\n"
        "    def __init__(self, files): self.files = files\n"
        "    def __getattr__(self, name): return getattr(self.files, name)\n"
        "    def open_output_stream(self, path):\n"
        "        count[0] += 1\n"
        f"        if count[0] == int(sys.argv[1]): os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "        return self.files.open_output_stream(path)\n"
        "stores._opened = lambda url: (Files(opened(url)[0]), opened(url)[1])\n"
        f"sys.exit(main(['--epoch', '1', '--workers', '1', '--config', {str(config.root / 'mixture.yaml')!r}]))"
    )
    shards, kills = None, 0
    for event in range(1, 40):
        done = subprocess.run([sys.executable, "-c", script, str(event)], check=False, capture_output=True)
        here = {name.partition("/")[2] for name in objects(served, prefix)}
        if done.returncode == 0:
            break
        kills += 1
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert MANIFEST not in here
        with pytest.raises(MissingError):
            loop.mixture(config, 1)
        if mds.INDEX in here:
            shards = len(here) - 1
    assert kills >= 3
    manifest, fresh = compile_epoch(config, 1)
    assert not fresh
    assert shards is None or shards == len(manifest.files) - 1
    assert verify_store(store_of(config, 1), manifest) == []


def test_training_fetches_a_mixture_and_holds_every_byte_against_the_manifest(tmp_path, prefix):
    config = stored(tmp_path, prefix)
    manifest, _ = compile_epoch(config, 1)
    folder = loop.mixture(config, 1).folder
    assert folder == run_folder(config).cache(manifest.digest())
    assert len(mds.Samples(folder)) == manifest.samples
    shutil.rmtree(folder)
    store, name = store_of(config, 1), "shard.00001.mds"
    content = store.read(name)
    store.put(name, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DamageError, match=r"epoch-0001/shard\.00001\.mds: its bytes have changed"):
        loop.mixture(config, 1)
    assert verify_store(store, manifest)[0].endswith("shard.00001.mds: its bytes have changed")
    remove(f"{store.url}/{name}")
    assert verify_store(store, manifest)[0].endswith("shard.00001.mds: is missing")
    store.put(name, content)
    assert loop.mixture(config, 1).digest == manifest.digest()


def test_what_was_fetched_is_removed_once_no_checkpoint_needs_it(tmp_path, prefix):
    from test_trace import trained

    config = stored(tmp_path, prefix)
    compile_epoch(config, 1)
    folder = loop.mixture(config, 1).folder
    trained(config, 1)
    assert collector.collect(config, print) > 0
    assert not folder.exists()
    assert loop.mixture(config, 1).folder == folder


# Pools


def pooled(folder, prefix):
    """A run whose pools are in the store, with several record batches to a part; nothing of them is on disk."""
    config = run_of(folder, pool={"store": prefix})
    for name in SIZES:
        pool.push(run_folder(config).pool(name), Store(prefix).below(name))
    shutil.rmtree(run_folder(config).pools)
    return config


def test_an_epoch_compiled_from_pools_in_a_store_has_the_same_bytes(tmp_path, prefix, monkeypatch):
    monkeypatch.setattr(pool, "BATCH_BYTES", 1000)
    config, local = pooled(tmp_path / "stored", prefix), run_of(tmp_path / "local")
    for found in (config, local):
        compile_epoch(found, 1)
    assert tree(run_folder(config).mixture(1)) == tree(run_folder(local).mixture(1))
    assert not list(run_folder(config).pools.rglob("part-*"))


def test_any_window_of_a_pool_in_a_store_is_that_of_the_pool_on_disk(tmp_path, prefix, monkeypatch):
    monkeypatch.setattr(pool, "BATCH_BYTES", 1000)
    here = open_pools(run_of(tmp_path / "local"))["law"]
    there = open_pools(pooled(tmp_path / "stored", prefix))["law"]
    for position, count in ((0, 1), (17, 30), (80, 60), (0, 90), (89, 2)):
        one, other = (
            [value for table in found.window(position, count) for value in table["sample_id"].to_pylist()]
            for found in (here, there)
        )
        assert one == other
    assert there.measured(3, 100, "tokens") == here.measured(3, 100, "tokens")
    assert there.find("law-000077") == here.find("law-000077")


def test_a_pool_without_its_manifest_is_none(tmp_path, prefix):
    config = pooled(tmp_path, prefix)
    remove(f"{prefix}/code/pool.json")
    with pytest.raises(MissingError, match="pool of 'code' not found"):
        open_pools(config)


def test_another_pool_in_its_place_is_refused(tmp_path, prefix):
    pooled(tmp_path / "one", prefix)
    other = run_of(tmp_path / "other", sizes={"law": 10, "medicine": 40, "code": 25})
    with pytest.raises(ConflictError, match="holds a pool that was made from other inputs"):
        pool.push(run_folder(other).pool("law"), Store(prefix).below("law"))


def test_a_damaged_part_in_a_store_is_named(tmp_path, prefix):
    config = pooled(tmp_path, prefix)
    Store(prefix).below("law").put("part-00001.arrow", b"damaged")
    with pytest.raises(DamageError, match=r"law/part-00001\.arrow has 7 bytes, pool\.json says"):
        compile_epoch(config, 1)


# Other stores


def test_a_store_that_only_fsspec_knows_is_reached_alike():
    store = Store("memory://place/below")
    assert store.read("x") is None
    store.put("x", b"content")
    assert (store.read("x"), store.size("x"), store.names()) == (b"content", 7, ["x"])


def test_a_store_of_no_known_kind_is_refused_by_its_url():
    with pytest.raises(VtmixError, match="nowhere://x: no such kind of store is known here"):
        Store("nowhere://x").read("y")


def test_wrong_credentials_are_one_error_that_says_what_to_check(served, monkeypatch):
    from vtmix import stores

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    stores._opened.cache_clear()
    with pytest.raises(VtmixError, match=r"s3://bucket/x.*credentials and endpoint"):
        Store("s3://bucket/x").put("y", b"")
    stores._opened.cache_clear()
