"""The mastery ceiling: each domain alone, in pool order, on the trainer's held-out samples; the lowest loss counts.

The trained losses are held against a training loop written out here with transformers' own loss.
"""

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st

from vtmix import mds, pool, pooling, reference, trainee
from vtmix.artifacts import DomainLoss, Losses, Reference
from vtmix.config import load, validate
from vtmix.errors import ConfigError, ConflictError, LossError, MissingError
from vtmix.signals import make_signals, unit_of

REFERENCE = {"epochs": 2, "samples": 30, "batch_size": 8, "lr": 3e-3}


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model):
    """A project whose pools are built and whose reference losses are measured; copy it before changing it."""
    folder = tmp_path_factory.mktemp("reference")
    config = load(write(folder, tiny_model))
    pooling.build(config, workers=1)
    reference.build(config)
    return folder


def write(folder: Path, tiny_model: Path, **overrides) -> Path:
    from conftest import project

    function = getattr(project, "__wrapped__", None) or project.__pytest_wrapped__.obj
    settings = {"reference": REFERENCE, "training": {"eval_samples": 7}, "model": str(tiny_model), **overrides}
    return function(folder, tiny_model)(folder, **settings)


@pytest.fixture
def project_copy(built, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    return folder


def without(folder: Path, *domains: str) -> None:
    """Takes the final file and some domains' away, as if the measurement had been interrupted."""
    (folder / "run/reference/reference.json").unlink()
    for domain in domains:
        (folder / f"run/reference/domains/{domain}.json").unlink()


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_domain_has_its_lowest_held_out_loss_and_the_curve_it_is_from(built):
    found = Reference.read(built / "run/reference/reference.json", "")
    assert list(found.domains) == list(WORDS)
    for loss in found.domains.values():
        assert len(loss.curve) == 1 + REFERENCE["epochs"]
        assert loss.per_token == min(loss.curve) == loss.curve[loss.epoch]
        assert loss.epoch == 2  # words seen only here are learnt quickly
        assert loss.samples == 7
        assert loss.standard_error > 0


def test_the_curve_is_that_of_fine_tuning_on_the_domain_alone_in_pool_order(built):
    import torch
    from transformers import AutoModelForCausalLM

    config = load(built / "mixture.yaml")
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=REFERENCE["lr"], weight_decay=0.0)
    law = pool.open_pool(built / "run/pool/law")
    assert law.manifest.samples < 2 * REFERENCE["samples"]  # the second epoch wraps around
    order = list(law.samples(0, 2 * REFERENCE["samples"]))
    held_out = mds.Samples(built / "run/pool/law/eval")[:7]
    curve = [mean_loss(model, held_out)]
    for epoch in range(2):
        mine = order[epoch * REFERENCE["samples"] : (epoch + 1) * REFERENCE["samples"]]
        model.train()
        for start in range(0, len(mine), REFERENCE["batch_size"]):
            nats, tokens = total(model, mine[start : start + REFERENCE["batch_size"]])
            (nats / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(mean_loss(model, held_out))
    found = Reference.read(built / "run/reference/reference.json", "").domains["law"].curve
    assert list(found) == pytest.approx(curve, rel=1e-4)


def total(model, samples):
    import torch

    nats, tokens = 0.0, 0
    for row in samples:
        ids, labels = (torch.tensor(row[name].astype("int64"))[None] for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        nats, tokens = nats + model(input_ids=ids, labels=labels).loss * count, tokens + count
    return nats, tokens


def mean_loss(model, samples) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        nats, tokens = total(model, samples)
    return float(nats) / tokens


def test_a_rerun_changes_nothing_and_loads_no_model(project_copy, monkeypatch):
    before = tree(project_copy)
    monkeypatch.setattr(reference, "train_domain", None)
    monkeypatch.setattr(reference, "load_tokenizer", None)
    found = reference.build(load(project_copy / "mixture.yaml"))
    assert list(found.domains) == list(WORDS)
    assert {name: value for name, value in tree(project_copy).items() if not name.endswith(".lock")} == {
        name: value for name, value in before.items() if not name.endswith(".lock")
    }


def test_an_interrupted_measurement_does_the_missing_domains_only_and_ends_the_same(built, project_copy, monkeypatch):
    without(project_copy, "medicine")
    trained = []
    actual = reference.train_domain
    monkeypatch.setattr(reference, "train_domain", lambda job, *rest: trained.append(job.domain) or actual(job, *rest))
    reference.build(load(project_copy / "mixture.yaml"))
    assert trained == ["medicine"]
    for name in ("reference.json", "domains/medicine.json"):
        assert (project_copy / "run/reference" / name).read_bytes() == (built / "run/reference" / name).read_bytes()


@pytest.mark.slow
def test_on_ray_losses_are_the_same_and_a_refusal_in_a_task_is_one_here(
    built,
    project_copy,
    tiny_model,
    ray_cluster,
):
    shutil.rmtree(project_copy / "run/reference")
    found = reference.build(load(project_copy / "mixture.yaml"), backend="ray").domains
    expected = Reference.read(built / "run/reference/reference.json", "").domains
    assert {name: loss.curve for name, loss in found.items()} == {
        name: pytest.approx(loss.curve, rel=1e-5) for name, loss in expected.items()
    }
    shutil.rmtree(project_copy / "run/reference")
    config = load(write(project_copy, tiny_model, reference={**REFERENCE, "lr": 1e30}))
    with pytest.raises(LossError, match="after epoch 1 is nan") as caught:
        reference.build(config, backend="ray")
    assert "Traceback" not in str(caught.value)


def test_losses_of_other_settings_are_refused_naming_them(project_copy, tiny_model):
    config = load(write(project_copy, tiny_model, reference={**REFERENCE, "lr": 1e-3}))
    before = tree(project_copy / "run")
    with pytest.raises(ConflictError, match=r"settings\.lr was 0\.003, is now 0\.001"):
        reference.build(config)
    assert tree(project_copy / "run") == before


def test_a_reference_written_by_hand_is_taken_as_it_is(project_copy):
    path = project_copy / "run/reference/reference.json"
    content = json.loads(path.read_text()) | {"inputs": None}
    path.write_text(json.dumps(content))
    assert reference.build(load(project_copy / "mixture.yaml")).inputs is None


def test_a_loss_that_is_not_finite_is_refused_naming_domain_and_epoch(project_copy, tiny_model):
    shutil.rmtree(project_copy / "run/reference")
    config = load(write(project_copy, tiny_model, reference={**REFERENCE, "lr": 1e30}))
    with pytest.raises(LossError, match="of the reference model of 'law' after epoch 1 is nan"):
        reference.build(config)
    assert not list((project_copy / "run/reference").glob("**/*.json"))


def test_pools_come_first(tmp_path, tiny_model):
    with pytest.raises(MissingError, match="run `vtmix pool` first"):
        reference.build(load(write(tmp_path, tiny_model)))


def byte_model(folder: Path) -> Path:
    """A model whose tokenizer knows bytes alone: many more tokens for the same text."""
    import torch
    from conftest import CHAT_TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(wrapped), max_position_embeddings=512, **sizes)).save_pretrained(folder)
    return folder


def test_a_reference_model_with_another_tokenizer_has_pools_of_its_own_and_bytes_to_compare_by(
    built, project_copy, tiny_model, tmp_path
):
    shutil.rmtree(project_copy / "run/reference")
    settings = {**REFERENCE, "epochs": 1, "samples": 8, "model": str(byte_model(tmp_path / "bytes"))}
    config = load(write(project_copy, tiny_model, reference=settings, encoding={"max_length": 256}))
    shutil.rmtree(project_copy / "run/pool")
    own = pooling.build(config, workers=1)
    found = reference.build(config)
    manifest = pool.open_pool(project_copy / "run/reference/pool/law").manifest
    assert found.tokenizer == manifest.inputs["tokenizer"] != own["law"].inputs["tokenizer"]
    same_text = Reference.read(built / "run/reference/reference.json", "")
    for domain, loss in found.domains.items():
        assert loss.tokens > 2 * same_text.domains[domain].tokens
        assert loss.bytes == same_text.domains[domain].bytes
        assert math.isfinite(loss.per_byte)
    before = tree(project_copy / "run/reference")
    assert reference.build(config) == found
    assert tree(project_copy / "run/reference") == before


def test_a_domain_that_was_interrupted_goes_on_after_its_last_epoch_and_ends_the_same(built, project_copy, monkeypatch):
    without(project_copy, "medicine", "code")
    config = load(project_copy / "mixture.yaml")
    monkeypatch.setattr(trainee, "CHECKPOINT_SECONDS", 0)
    train = trainee.Trainee.train
    epochs = []

    def counted(found):
        epochs.append((found._job.domain, found.epoch))
        if epochs == [("medicine", 0), ("medicine", 1)]:
            raise KeyboardInterrupt
        train(found)

    monkeypatch.setattr(trainee.Trainee, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        reference.build(config)
    assert (project_copy / "run/reference/checkpoints/medicine/step-00000001/state.pt").exists()
    epochs.clear()
    epochs.append(("after", 0))
    reference.build(config)
    assert epochs == [("after", 0), ("medicine", 1), ("code", 0), ("code", 1)]
    for name in ("reference.json", "domains/medicine.json"):
        assert (project_copy / "run/reference" / name).read_bytes() == (built / "run/reference" / name).read_bytes()
    assert not (project_copy / "run/reference/checkpoints").exists()


def test_a_checkpoint_of_other_settings_is_refused_naming_the_domain(project_copy, tiny_model, monkeypatch):
    without(project_copy, *WORDS)
    monkeypatch.setattr(trainee, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(trainee.Trainee, "checkpoint", stopped := stop_after(trainee.Trainee.checkpoint))
    with pytest.raises(KeyboardInterrupt):
        reference.build(load(project_copy / "mixture.yaml"))
    monkeypatch.setattr(trainee.Trainee, "checkpoint", stopped.__wrapped__)
    config = load(write(project_copy, tiny_model, reference={**REFERENCE, "lr": 1e-3}))
    with pytest.raises(ConflictError, match=r"was trained with other settings, or on another pool, .* of 'law'"):
        reference.build(config)


def stop_after(method):
    @functools.wraps(method)
    def stopping(*arguments):
        method(*arguments)
        raise KeyboardInterrupt

    return stopping


def test_what_the_ceiling_cost_is_counted_in_tokens(built):
    found = Reference.read(built / "run/reference/reference.json", "")
    for domain, loss in found.domains.items():
        samples = pool.open_pool(built / "run/pool" / domain).samples(0, REFERENCE["epochs"] * REFERENCE["samples"])
        assert loss.trained_tokens == sum(len(sample["input_ids"]) for sample in samples)
    assert list(reference.summary(found))[-1].startswith(
        f"cost: {sum(x.trained_tokens for x in found.domains.values()):,}"
    )


GIVEN = {"law": 1.5, "medicine": 0.25, "code": 2.0}


@pytest.mark.parametrize("unit", ["nats_per_token", "nats_per_byte"])
def test_losses_given_as_numbers_are_taken_as_they_are_in_their_unit(project_copy, tiny_model, unit, monkeypatch):
    shutil.rmtree(project_copy / "run/reference")
    monkeypatch.setattr(reference, "train_domain", None)
    config = load(write(project_copy, tiny_model, reference={"losses": GIVEN, "unit": unit}))
    found = reference.build(config)
    losses = Losses(
        epoch=1,
        tokenizer="any",
        mixture=None,
        domains=dict.fromkeys(WORDS, DomainLoss(nats=30, tokens=10, bytes=20, samples=2)),
    )
    assert unit_of(losses, found) == unit
    signals = make_signals(losses, None, found, unit)
    assert {name: signal.reference for name, signal in signals.items()} == GIVEN
    assert {signal.loss for signal in signals.values()} == {3.0 if unit == "nats_per_token" else 1.5}
    before = tree(project_copy / "run/reference")
    assert reference.build(config) == found
    assert tree(project_copy / "run/reference") == before


def test_given_losses_that_change_are_refused_naming_them(project_copy, tiny_model):
    shutil.rmtree(project_copy / "run/reference")
    reference.build(load(write(project_copy, tiny_model, reference={"losses": GIVEN})))
    with pytest.raises(ConflictError, match=r"losses\.law was 1\.5, is now 1\.6"):
        reference.build(load(write(project_copy, tiny_model, reference={"losses": GIVEN | {"law": 1.6}})))


def test_given_losses_of_other_domains_are_refused(tmp_path, tiny_model):
    with pytest.raises(
        ConfigError, match=r"reference\.losses has law, expected every domain and no other: law, medicine, code"
    ):
        load(write(tmp_path, tiny_model, reference={"losses": {"law": 1.0}}))


@given(
    share=st.floats(1e-3, 1),
    epoch=st.integers(1, 100_000),
    pools=st.dictionaries(
        st.sampled_from(list(WORDS)),
        st.tuples(*[st.integers(1, 5000)] * 4),
        min_size=1,
    ),
)
def test_evaluation_takes_no_more_than_its_share_of_an_epochs_tokens_or_one_sample_each(share, epoch, pools):
    raw = {"model": "none", "domains": {name: {"train": "-"} for name in pools}, "samples_per_epoch": epoch}
    config = validate(raw | {"training": {"eval_share": share}}, Path("mixture.yaml"))
    manifests = {
        name: SimpleNamespace(
            samples=samples, tokens=samples * length, eval=SimpleNamespace(samples=held, tokens=held * eval_length)
        )
        for name, (samples, length, held, eval_length) in pools.items()
    }
    sizes = pool.eval_sizes(config, manifests)
    trained = 3 * epoch * min(length for _, length, _, _ in pools.values())
    spent = sum(size * pools[name][3] for name, size in sizes.items() if size > 1)
    assert spent <= share * trained * (1 + 1e-9)
    for name, size in sizes.items():
        assert 1 <= size <= pools[name][2]
        larger = size + 1
        assert size == pools[name][2] or larger * pools[name][3] > share * trained / len(pools) * (1 - 1e-9)


def test_the_share_and_the_number_of_eval_samples_exclude_each_other(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="give one of 'eval_samples' and 'eval_share'"):
        load(write(tmp_path, tiny_model, training={"eval_samples": 7, "eval_share": 0.1}))
