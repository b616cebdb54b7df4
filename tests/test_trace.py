"""Where a sample stands and what a step saw is computed, and is what stands on disk; removed mixtures come back."""

import json
import shutil

import pytest
from handmade import SHARES, SIZES, run_of, tree, write_weights
from hypothesis import given
from hypothesis import strategies as st

from vtmix import cli, commit, mds
from vtmix import gc as collector
from vtmix.artifacts import DomainLoss, Losses, Manifest, run_folder
from vtmix.checkpoints import publish, staged
from vtmix.compile import compile_epoch
from vtmix.config import load
from vtmix.errors import ConflictError, MissingError, MixtureError
from vtmix.plan import Arrangement, shard_bounds, shard_of
from vtmix.trace import of_sample, of_step
from vtmix.verify import require_intact

EPOCHS = (1, 2, 3)
BATCH = 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Three epochs of several shards, in the second of which a small pool is passed several times."""
    config = run_of(tmp_path_factory.mktemp("traced"), training={"batch_size": BATCH})
    write_weights(config, 2, {"law": 0.3, "medicine": 0.1, "code": 0.6})
    write_weights(config, 3, {"law": 1.0, "medicine": 0.0, "code": 0.0})
    for epoch in EPOCHS:
        compile_epoch(config, epoch)
    return config


@pytest.fixture
def config(compiled, tmp_path):
    """A copy of that run, to be changed."""
    return load(shutil.copytree(compiled.root, tmp_path / "copy") / "mixture.yaml")


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any), st.integers(0, 99))
def test_the_arrangement_is_read_in_both_directions(counts, seed):
    order = Arrangement(tuple(f"d{number}" for number in range(len(counts))), tuple(counts), seed)
    domains, ranks = order.stretch(0, order.samples)
    for position, (domain, rank) in enumerate(zip(domains.tolist(), ranks.tolist(), strict=True)):
        assert order.position(domain, rank) == position


def members(folder):
    """The ids in every row of a mixture, read as MDS by MosaicML's reader."""
    from streaming import StreamingDataset

    for row in StreamingDataset(local=str(folder), shuffle=False, num_canonical_nodes=1, batch_size=1):
        yield row["sample_ids"].split(",") if "sample_ids" in row else [row["sample_id"]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three epochs of packed sequences, which have not equally many steps."""
    packing = {"shard_bytes": 16384, "packing": {"length": 64}}
    settings = {"training": {"batch_size": BATCH}, "mixture": packing, "encoding": {"max_length": 64}}
    config = run_of(tmp_path_factory.mktemp("packed"), **settings)
    write_weights(config, 2, {"law": 0.3, "medicine": 0.1, "code": 0.6})
    write_weights(config, 3, {"law": 1.0, "medicine": 0.0, "code": 0.0})
    for epoch in EPOCHS:
        compile_epoch(config, epoch)
    return config


@pytest.mark.parametrize("which", ["compiled", "packed"])
def test_every_sample_is_traced_to_the_epochs_and_steps_that_a_reader_sees_it_in(request, which):
    config = request.getfixturevalue(which)
    expected, steps = {}, 0
    for epoch in EPOCHS:
        rows = list(members(run_folder(config).mixture(epoch)))
        for row, ids in enumerate(rows):
            for identity in ids:
                expected.setdefault(identity, []).append((epoch, row // BATCH + 1, steps + row // BATCH + 1))
        steps += -(-len(rows) // BATCH)
    for name, size in SIZES.items():
        for number in range(0, size, 3):
            found = of_sample(config, f"{name}-{number:06d}")
            seen = [(seen.epoch, seen.step, seen.run_step) for seen in found]
            assert seen == expected.get(f"{name}-{number:06d}", [])
    assert max(map(len, expected.values())) > 3


def test_a_traced_row_is_that_of_the_sample_in_its_shard(compiled):
    for seen in of_sample(compiled, "code-000003"):
        raw = (run_folder(compiled).mixture(seen.epoch) / seen.shard).read_bytes()
        begin, end = (int.from_bytes(raw[4 + 4 * n : 8 + 4 * n], "little") for n in (seen.row, seen.row + 1))
        assert mds.decode_sample(raw[begin:end])["sample_id"] == "code-000003"


@pytest.mark.parametrize("which", ["compiled", "packed"])
def test_a_step_lists_what_a_reader_is_given_at_that_step(request, which):
    config = request.getfixturevalue(which)
    rows = list(members(run_folder(config).mixture(2)))
    steps = -(-len(rows) // BATCH)
    for step in range(1, steps + 1):
        found = of_step(config, 2, step)
        batch = rows[(step - 1) * BATCH : step * BATCH]
        assert [seen.sample_id for seen in found] == [identity for ids in batch for identity in ids]
    with pytest.raises(MixtureError, match=f"has the steps 1 to {steps}, found {steps + 1}"):
        of_step(config, 2, steps + 1)


@given(st.integers(1, 10**10), st.integers(1, 10**5), st.data())
def test_the_shard_of_a_position_is_the_one_whose_bounds_hold_it(samples, shards, data):
    plan = type("Plan", (), {"samples": samples, "shards": min(shards, samples)})
    position = data.draw(st.integers(0, samples - 1))
    number, place = shard_of(plan, position)
    start, stop = number * samples // plan.shards, (number + 1) * samples // plan.shards
    assert start <= position < stop
    assert place == position - start
    if plan.shards < 100:
        assert shard_bounds(plan)[number] == (start, stop)


def test_a_sample_that_no_pool_holds_is_asked_about(compiled):
    with pytest.raises(MissingError, match=r"no pool in .* holds a sample 'law-999999'"):
        of_sample(compiled, "law-999999")


def run_cli(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["vtmix", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code, capsys.readouterr()


def test_the_command_traces_samples_and_steps(compiled, capsys, monkeypatch):
    config = ["--config", compiled.root / "mixture.yaml"]
    code, out = run_cli(capsys, monkeypatch, "trace", "code-000003", *config)
    assert (code, out.out.count("code code-000003 in row")) == (0, len(of_sample(compiled, "code-000003")))
    code, out = run_cli(capsys, monkeypatch, "trace", "--epoch", 2, "--step", 3, *config)
    assert (code, len(out.out.splitlines())) == (0, BATCH)
    code, out = run_cli(capsys, monkeypatch, "trace", "--epoch", 2, *config)
    assert code == 2
    assert "give either a sample id, or both --epoch and --step" in out.err


# What is planned, in words


def test_a_plan_is_shown_with_its_difference_from_the_epoch_before(compiled, capsys, monkeypatch):
    config = ["--config", compiled.root / "mixture.yaml"]
    _, first = run_cli(capsys, monkeypatch, "plan", "--epoch", 1, *config)
    _, second = run_cli(capsys, monkeypatch, "plan", "--epoch", 2, *config)
    assert "difference" not in first.out
    assert "in brackets: the difference from epoch 1" in second.out
    law = next(line.split() for line in second.out.splitlines() if line.split()[:1] == ["law"])
    assert law[:6] == ["law", "0.3000", "(-0.2000)", "36", "(-24)", "30.00%"]
    manifest = Manifest.read(run_folder(compiled).manifest(2), "")
    assert f"{manifest.domains['law'].tokens:,}" in law
    assert law[-2:] == ["0.40", "100.0%"]  # 60 and 36 of 90: all of the pool was seen


def test_a_dry_run_shows_the_plan_and_the_fingerprint_and_writes_nothing(config, capsys, monkeypatch):
    run = run_folder(config)
    run.plan(3).unlink()
    shutil.rmtree(run.mixture(3))
    before = tree(run.path)
    yaml = config.root / "mixture.yaml"
    code, out = run_cli(capsys, monkeypatch, "compile", "--epoch", 3, "--dry-run", "--config", yaml)
    assert code == 0
    assert tree(run.path) == before
    manifest, _ = compile_epoch(config, 3)
    assert f"fingerprint {manifest.fingerprint_of_inputs}" in out.out


# Removal


def trained(config, *epochs):
    """Pretends that epochs were trained, by their losses."""
    loss = DomainLoss(nats=1.0, tokens=1, bytes=1, samples=1)
    for epoch in epochs:
        Losses(epoch=epoch, tokenizer="", mixture=None, domains=dict.fromkeys(SHARES, loss)).publish(
            run_folder(config).losses(epoch)
        )


def checkpoint(config, epoch):
    state = staged(run_folder(config).checkpoints, epoch)
    state.parent.mkdir(parents=True)
    state.write_bytes(b"state")
    digest = Manifest.read(run_folder(config).manifest(epoch), "").digest()
    publish(state, step=epoch, epoch=epoch, mixture=digest, keep=2)


def test_only_mixtures_that_no_checkpoint_and_no_epoch_to_come_needs_are_removed(config):
    run, said = run_folder(config), []
    trained(config, 1, 2)
    checkpoint(config, 2)
    size = sum(path.stat().st_size for path in run.mixture(1).iterdir())
    assert collector.collect(config, said.append, dry_run=True) == size
    assert run.mixture(1).is_dir()
    assert collector.collect(config, said.append) == size
    assert [path.name for path in sorted(run.mixture(1).parent.iterdir())] == [
        "epoch-0001.json",
        "epoch-0002",
        "epoch-0003",
    ]
    assert said[-1].startswith("epoch 1: ")
    assert collector.collect(config, said.append) == 0


def test_nothing_is_removed_before_it_was_trained(config):
    assert collector.collect(config, print) == 0
    assert run_folder(config).mixture(1).is_dir()


def test_a_removed_epoch_is_compiled_again_to_the_same_bytes(config):
    run = run_folder(config)
    before = tree(run.mixture(1))
    trained(config, 1)
    collector.collect(config, print)
    assert not run.mixture(1).exists()
    _, fresh = compile_epoch(config, 1)
    assert fresh
    assert tree(run.mixture(1)) == before
    assert not run.kept_manifest(1).exists()
    require_intact(run.mixture(1))


def test_a_removed_epoch_that_would_come_out_otherwise_is_refused(config):
    run = run_folder(config)
    trained(config, 1)
    collector.collect(config, print)
    path = run.kept_manifest(1)
    content = json.loads(path.read_text())
    content["files"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(ConflictError, match="other bytes than it had when it was removed"):
        compile_epoch(config, 1)
    assert not run.mixture(1).exists()


def test_samples_of_a_removed_epoch_are_still_traced(config):
    before = of_sample(config, "law-000000")
    trained(config, 1, 2)
    collector.collect(config, print)
    assert of_sample(config, "law-000000") == before
    assert of_step(config, 1, 1)


def test_a_removal_that_was_cut_short_is_finished_by_the_next(config, monkeypatch):
    run = run_folder(config)
    trained(config, 1)
    monkeypatch.setattr(commit.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collector.collect(config, print)
    monkeypatch.undo()
    assert not run.mixture(1).exists()
    assert run.manifest(1) == run.kept_manifest(1)
    collector.collect(config, print)
    assert not list(run.mixture(1).parent.glob(".*"))
