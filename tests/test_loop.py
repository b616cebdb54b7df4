"""The closed loop's files: asked again it answers the same, and what must not move the weights changes nothing."""

import json
import math
import shutil
from itertools import pairwise

import pytest
from handmade import SIZES, run_of, samples, write_config, write_pool, write_weights

from vtmix import loop, published
from vtmix.artifacts import (
    DetectionReport,
    DomainLoss,
    Losses,
    Manifest,
    Plan,
    Reference,
    ReferenceLoss,
    Weights,
    run_folder,
)
from vtmix.config import load
from vtmix.detect import detect
from vtmix.errors import ConflictError, DamageError, LossError, MissingError

VERSATUNE = {"algorithm": "versatune", "sigma": 0.5}


def losses(**per_token):
    """Losses in nats per token over 100 tokens of 400 bytes."""
    values = {"law": 2.0, "medicine": 3.0, "code": 1.0} | per_token
    return {
        name: value
        if isinstance(value, DomainLoss)
        else DomainLoss(nats=100 * value, tokens=100, bytes=400, samples=5, standard_error=0.001)
        for name, value in values.items()
    }


def with_potentials(config):
    """A detection and reference losses written by hand: γ is 0.5, 0 and 0.5 at the losses above."""
    run = run_folder(config)
    DetectionReport(distribution={"law": 0.5, "medicine": 0.2, "code": 0.3}).publish(run.detection)
    ceiling = {"law": 1.0, "medicine": 3.0, "code": 0.5}
    domains = {
        name: ReferenceLoss(nats=100 * value, tokens=100, bytes=400, samples=5, epoch=2)
        for name, value in ceiling.items()
    }
    Reference(tokenizer="by hand", domains=domains).publish(run.reference)
    return config


@pytest.fixture
def uniform(tmp_path):
    """A run whose weights are uniform, with no file in it but its pools."""
    return without_weights(run_of(tmp_path))


@pytest.fixture
def versatune(tmp_path):
    """A run that has its detection and its reference losses."""
    return with_potentials(without_weights(run_of(tmp_path, weights=VERSATUNE)))


def without_weights(config):
    shutil.rmtree(run_folder(config).weights(1).parent)
    return config


def stamps(config):
    """Inode, size and times of everything in the run folder."""
    return {
        str(path): (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for path in sorted(run_folder(config).path.rglob("*"))
        for found in [path.lstat()]
    }


def test_the_whole_loop_hands_out_every_epoch_and_ends(versatune):
    mixture = loop.begin(versatune, losses())
    seen = []
    while mixture:
        seen.append((mixture.epoch, mixture.folder, mixture.digest))
        assert mixture.manifest.epoch == mixture.epoch
        mixture = loop.advance(versatune, mixture.epoch, losses(law=2.0 / mixture.epoch))
    run = run_folder(versatune)
    assert [epoch for epoch, _, _ in seen] == [1, 2, 3]
    assert [folder for _, folder, _ in seen] == [run.mixture(epoch) for epoch in (1, 2, 3)]
    assert len({digest for _, _, digest in seen}) == 3
    for epoch in (1, 2, 3):
        assert run.losses(epoch).exists()
        assert Losses.read(run.losses(epoch), "").mixture == seen[epoch - 1][2]
    assert Losses.read(run.losses(0), "").mixture is None


def test_all_that_is_made_from_a_published_distribution_says_so(tmp_path):
    sizes = dict.fromkeys(published.DOMAINS, 30)
    config = without_weights(
        run_of(tmp_path, sizes, dict.fromkeys(sizes, 1 / 6), weights=VERSATUNE, detection={"published": "llama-3-8b"})
    )
    run, label = run_folder(config), "published for llama-3-8b by the paper's authors, not detected"
    assert detect(config).knowledge == label
    found = {name: DomainLoss(nats=200.0, tokens=100, bytes=400, samples=5) for name in sizes}
    ceiling = {name: ReferenceLoss(nats=100.0, tokens=100, bytes=400, samples=5, epoch=1) for name in sizes}
    Reference(tokenizer="by hand", domains=ceiling).publish(run.reference)
    loop.begin(config, found)
    loop.advance(config, 1, found)
    for epoch in (1, 2):
        assert Weights.read(run.weights(epoch), "").knowledge == label
        assert Plan.read(run.plan(epoch), "").knowledge == label
        assert Manifest.read(run.manifest(epoch), "").knowledge == label


def test_asked_again_it_answers_the_same_and_touches_nothing(versatune):
    first = loop.begin(versatune, losses())
    second = loop.advance(versatune, 1, losses(law=1.5))
    before = stamps(versatune)
    for _ in range(2):
        assert loop.begin(versatune, losses()) == first
        assert loop.advance(versatune, 1, losses(law=1.5)) == second
        assert loop.mixture(versatune, 2) == second
    assert stamps(versatune) == before


def test_losses_committed_earlier_win_even_over_bad_ones(versatune):
    loop.begin(versatune, losses())
    second = loop.advance(versatune, 1, losses(law=1.5))
    before = stamps(versatune)
    assert loop.advance(versatune, 1, losses(law=9.0)) == second
    assert loop.advance(versatune, 1, losses(law=math.nan)) == second
    assert loop.begin(versatune, {}).epoch == 1
    assert stamps(versatune) == before
    assert loop.losses_of(versatune, 1).domains["law"].per_token == 1.5


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_stopped_between_any_two_files_it_goes_on_to_the_same_end(versatune, kept):
    loop.begin(versatune, losses())
    expected = loop.advance(versatune, 1, losses(law=1.5))
    run = run_folder(versatune)
    shutil.rmtree(expected.folder)
    in_order = [run.losses(1), run.weights(2), run.plan(2)]
    for path in in_order[kept:]:
        path.unlink()
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in in_order[:kept]]
    assert loop.advance(versatune, 1, losses(law=1.5)) == expected
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in in_order[:kept]] == before


BAD = {
    "a standard error that is nan": (
        {"law": DomainLoss(nats=1.0, tokens=1, bytes=1, samples=1, standard_error=math.nan)},
        "standard error of the loss of 'law' is nan at epoch 1",
    ),
    "nan": ({"law": math.nan}, "eval loss of 'law' is nan at epoch 1"),
    "infinite": ({"law": math.inf, "code": -math.inf}, "eval loss of 'code' is -inf at epoch 1"),
    "negative": ({"medicine": -0.5}, "eval loss of 'medicine' is negative (-50 nats) at epoch 1"),
    "foreign": ({"art": 1.0}, "'art' has an eval loss at epoch 1 but is no domain of this run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_losses_are_refused_by_name_and_change_nothing(versatune, case):
    values, sentence = BAD[case]
    loop.begin(versatune, losses())
    before = stamps(versatune)
    with pytest.raises(LossError) as refusal:
        loop.advance(versatune, 1, losses(**values))
    assert str(refusal.value).startswith("refusing to update weights: ")
    assert sentence in str(refusal.value)
    assert stamps(versatune) == before


def test_missing_and_empty_losses_are_refused_with_all_others_at_once(versatune):
    loop.begin(versatune, losses())
    before = stamps(versatune)
    found = losses(law=math.nan, art=1.0)
    del found["code"]
    found["medicine"] = DomainLoss(nats=0.0, tokens=0, bytes=0, samples=0)
    with pytest.raises(LossError) as refusal:
        loop.advance(versatune, 1, found)
    for sentence in (
        "eval loss of 'code' is missing at epoch 1",
        "eval loss of 'law' is nan at epoch 1",
        "eval loss of 'medicine' was taken over 0 tokens, 0 bytes at epoch 1",
        "'art' has an eval loss at epoch 1 but is no domain of this run",
    ):
        assert sentence in str(refusal.value)
    assert stamps(versatune) == before


def test_bad_base_losses_begin_nothing(versatune):
    before = stamps(versatune)
    with pytest.raises(LossError, match="eval loss of 'law' is nan at epoch 0"):
        loop.begin(versatune, losses(law=math.nan))
    assert stamps(versatune) == before


def test_losses_of_an_epoch_that_was_never_compiled_are_refused(uniform):
    loop.begin(uniform, losses())
    before = stamps(uniform)
    with pytest.raises(MissingError, match=r"mixture for epoch 2 not found .*: compile epoch 2 and train on it first"):
        loop.advance(uniform, 2, losses())
    assert stamps(uniform) == before


def test_losses_over_another_eval_split_are_refused_by_name(uniform, tmp_path):
    loop.begin(uniform, losses())
    path = run_folder(uniform).pool("law") / "pool.json"
    content = json.loads(path.read_text())
    content["eval"]["digest"] = "other"
    path.write_text(json.dumps(content))
    with pytest.raises(ConflictError, match=r"eval_splits\.law was 'law', is now 'other'"):
        loop.begin(uniform, losses())


def test_the_configuration_holds_for_the_whole_run(tmp_path, uniform):
    loop.begin(uniform, losses())
    before = stamps(uniform)
    changed = load(write_config(tmp_path, seed=8, mixture={"shard_bytes": 9000}))
    for call in (lambda: loop.begin(changed, losses()), lambda: loop.advance(changed, 1, losses())):
        with pytest.raises(ConflictError) as refusal:
            call()
        assert "the run was begun with another configuration" in str(refusal.value)
        assert "seed was 7, is now 8\n  mixture.shard_bytes was 8192, is now 9000" in str(refusal.value)
    assert stamps(uniform) == before


def test_settings_that_only_steer_execution_may_change(tmp_path, uniform):
    first = loop.begin(uniform, losses())
    training = {"device": "gpu", "eval_batch_size": 3, "microbatch_size": 2, "processes": 4, "loggers": ["wandb"]}
    moved = run_folder(uniform).path.rename(tmp_path / "moved")
    again = loop.begin(load(write_config(tmp_path, training=training), run=moved), losses())
    assert (again.digest, again.folder) == (first.digest, moved / "mixture" / "epoch-0001")


def test_a_run_begun_before_a_setting_existed_goes_on_with_its_default(uniform):
    first = loop.begin(uniform, losses())
    path = run_folder(uniform).config
    older = path.read_text().replace("  warmup: 0.03\n", "")
    assert older != path.read_text()
    path.write_text(older)
    assert loop.begin(uniform, losses()) == first


def test_the_frozen_configuration_names_no_absolute_path_of_the_run(tmp_path, uniform):
    loop.begin(uniform, losses())
    assert str(tmp_path) not in run_folder(uniform).config.read_text()


def test_weights_move_by_the_learnable_potential(versatune):
    loop.begin(versatune, losses())
    loop.advance(versatune, 1, losses())
    run = run_folder(versatune)
    assert Weights.read(run.weights(1), "").weights == {"law": 0.5, "medicine": 0.2, "code": 0.3}
    found = Weights.read(run.weights(2), "")
    # 0.5 · 1.25 + 0.2 · 1 + 0.3 · 1.25 = 1.2
    assert found.weights == pytest.approx({"law": 0.625 / 1.2, "medicine": 0.2 / 1.2, "code": 0.375 / 1.2})
    assert Plan.read(run.plan(2), "").domains["law"].weight == found.weights["law"]


def test_a_forgotten_domain_shows_against_the_epoch_before(versatune):
    loop.begin(versatune, losses())
    loop.advance(versatune, 1, losses(code=1.5))
    loop.advance(versatune, 2, losses(code=1.0))
    run = run_folder(versatune)
    assert Weights.read(run.weights(2), "").terms["code"].forgetting == 0.5
    assert Weights.read(run.weights(3), "").terms["code"].forgetting == 0
    assert Weights.read(run.weights(3), "").terms["code"].previous_loss == 1.5


def test_what_the_weights_need_is_missed_before_anything_is_evaluated(versatune):
    loop.require_ready(versatune)
    run = run_folder(versatune)
    run.reference.unlink()
    with pytest.raises(MissingError, match="run `vtmix reference` first"):
        loop.require_ready(versatune)
    run.detection.unlink()
    with pytest.raises(MissingError, match="run `vtmix detect` first"):
        loop.require_ready(versatune)
    for epoch in range(1, versatune.epochs + 1):
        Weights(epoch=epoch, weights={"law": 0.5, "medicine": 0.3, "code": 0.2}).publish(run.weights(epoch))
    loop.require_ready(versatune)


def test_update_before_first_epoch_moves_epoch_1_already(tmp_path):
    config = with_potentials(
        without_weights(run_of(tmp_path, weights={**VERSATUNE, "update_before_first_epoch": True}))
    )
    loop.begin(config, losses())
    run = run_folder(config)
    found = Weights.read(run.weights(1), "")
    assert found.weights == pytest.approx({"law": 0.625 / 1.2, "medicine": 0.2 / 1.2, "code": 0.375 / 1.2})
    assert found.terms["law"].previous == 0.5
    assert found.terms["law"].forgetting == 0
    loop.advance(config, 1, losses())
    assert Weights.read(run.weights(2), "").terms["law"].previous == found.weights["law"]
    before = stamps(config)
    loop.begin(config, losses())
    assert stamps(config) == before


def test_a_stage_that_was_skipped_is_named(versatune):
    run_folder(versatune).reference.unlink()
    loop.begin(versatune, losses())
    with pytest.raises(MissingError, match=r"reference not found .*: run `vtmix reference` first, or write the file"):
        loop.advance(versatune, 1, losses())
    run_folder(versatune).detection.unlink()
    with pytest.raises(MissingError, match=r"detection not found .*: run `vtmix detect` first, or write the file"):
        loop.begin(versatune, losses())


def test_weights_written_by_hand_are_taken_and_need_no_other_stage(tmp_path):
    config = without_weights(run_of(tmp_path, weights=VERSATUNE))
    by_hand = {1: {"law": 0.1, "medicine": 0.1, "code": 0.8}, 2: {"law": 1.0, "medicine": 0.0, "code": 0.0}}
    for epoch, shares in by_hand.items():
        write_weights(config, epoch, shares)
    first = loop.begin(config, losses())
    second = loop.advance(config, 1, losses())
    assert {name: domain.samples for name, domain in first.manifest.domains.items()} == {
        "law": 12,
        "medicine": 12,
        "code": 96,
    }
    assert second.manifest.domains["law"].samples == 120


def test_weights_made_from_other_losses_are_refused_by_name(versatune):
    loop.begin(versatune, losses())
    loop.advance(versatune, 1, losses())
    run = run_folder(versatune)
    edited = json.loads(run.losses(1).read_text())
    edited["domains"]["law"]["nats"] = 150.0
    run.losses(1).write_text(json.dumps(edited))
    with pytest.raises(ConflictError, match=r"weights/epoch-0002\.json was made from other inputs.*\n  losses was '"):
        loop.advance(versatune, 1, losses())


def test_positions_carry_over_epochs(uniform):
    mixture = loop.begin(uniform, losses())
    while mixture:
        mixture = loop.advance(uniform, mixture.epoch, losses())
    plans = [Plan.read(run_folder(uniform).plan(epoch), "") for epoch in (1, 2, 3)]
    for before, after in pairwise(plans):
        for name in SIZES:
            assert after.domains[name].position == before.domains[name].position + before.domains[name].count


def test_a_pool_rebuilt_between_epochs_is_refused_before_its_weights_are_used(uniform):
    loop.begin(uniform, losses())
    pool = run_folder(uniform).pool("code")
    shutil.rmtree(pool)
    write_pool(pool, "code", list(samples("code", 26)))
    with pytest.raises(ConflictError, match=r"pools\.code was"):
        loop.begin(uniform, losses())


def test_a_damaged_mixture_is_not_handed_out(uniform):
    mixture = loop.begin(uniform, losses())
    path = mixture.folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for call in (lambda: loop.begin(uniform, losses()), lambda: loop.mixture(uniform, 1)):
        with pytest.raises(DamageError, match=r"shard\.00000\.mds: its bytes have changed"):
            call()
