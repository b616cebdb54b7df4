"""Losses are sums over response tokens: padding, batching, microbatching and ranks never change them.

Each is held against arithmetic done by hand or by transformers' own loss on one sample at a time.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtmix import batches
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError
from vtmix.mds import IGNORED

PAD = 0


def sample(ids, labels=None, name="s"):
    labels = ids if labels is None else labels
    arrays = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
    for array in arrays.values():
        array.setflags(write=False)  # as StreamingDataset gives them
    return {**arrays, "domain": "law", "sample_id": name}


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return batches.load_model(str(tiny_model)).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(str(tiny_model))


def sums_of(model, tokenizer, samples):
    import torch

    batch = batches.collate(samples, PAD)
    with torch.no_grad():
        return batches.LossSums.of(batch, batches.response_nats(model, batch), tokenizer)


def test_rows_are_padded_at_their_end_and_nothing_padded_carries_a_label():
    batch = batches.collate([sample([5, 6, 7], [IGNORED, 6, 7], "a"), sample([8], [8], "b")], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {str(batch[name].dtype) for name in ("input_ids", "attention_mask", "labels")} == {"torch.int64"}
    assert (batch["sample_id"], batch["domain"]) == (["a", "b"], ["law", "law"])


def test_a_position_predicts_the_next_token_and_the_first_token_is_never_predicted():
    batch = batches.collate([sample([5, 6, 7], [5, IGNORED, 7])], PAD)
    assert batches.targets(batch["labels"]).tolist() == [[IGNORED, 7, IGNORED]]
    assert batches.response_tokens(batch) == 1


def test_microbatches_hold_every_row_once_alike_in_length_and_cut_to_the_longest():
    rows = [sample([9] * length, name=str(length)) for length in (5, 2, 4, 2, 1)]
    found = batches.split(batches.collate(rows, PAD), 2)
    assert [part["sample_id"] for part in found] == [["1", "2"], ["2", "4"], ["5"]]
    assert [tuple(part["labels"].shape) for part in found] == [(2, 2), (2, 4), (1, 5)]
    assert found[1]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_microbatches_in_order_keep_their_last_row_last():
    rows = [sample([9] * length, name=str(length)) for length in (5, 2, 4)]
    found = batches.split_in_order(batches.collate(rows, PAD), 2)
    assert [part["sample_id"] for part in found] == [["5", "2"], ["4"]]
    assert [tuple(part["labels"].shape) for part in found] == [(2, 5), (1, 5)]


def fixed_logits_model(logits):
    """Gives the same (length, vocabulary) logits to every row, and has no head to hook."""

    def forward(input_ids, attention_mask, use_cache):
        import torch

        rows = torch.tensor(logits)[: input_ids.shape[1]]
        return SimpleNamespace(logits=rows.expand(len(input_ids), *rows.shape))

    forward.get_output_embeddings = lambda: None
    return forward


def test_nats_are_minus_the_log_probability_of_each_response_token():
    # Probabilities 1/4, 3/4 at position 0 and 1/2, 1/2 at position 1.
    logits = [[0.0, math.log(3)], [0.0, 0.0], [7.0, -7.0]]
    batch = batches.collate([sample([1, 1, 0]), sample([1, 0])], PAD)
    found = batches.response_nats(fixed_logits_model(logits), batch).tolist()
    assert found == pytest.approx([math.log(4 / 3), math.log(2), math.log(4)], rel=1e-6)


def test_losses_equal_those_of_transformers_on_one_sample_at_a_time(model, tokenizer):
    import torch

    rng = np.random.default_rng(0)
    samples = []
    for length in (17, 3, 40, 2):
        ids = rng.integers(3, 512, length)
        samples.append(sample(ids, np.where(np.arange(length) >= length // 2, ids, IGNORED)))
    nats, tokens = 0.0, 0
    for row in samples:
        ids, labels = (torch.tensor(row[name].astype(np.int64))[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            count = int((labels[:, 1:] != IGNORED).sum())
            nats += float(model(input_ids=ids, labels=labels).loss) * count
            tokens += count
    found = sums_of(model, tokenizer, samples).loss()
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.samples) == (tokens, 4)


lengths = st.lists(st.integers(2, 24), min_size=1, max_size=6)


@settings(max_examples=25)
@given(lengths=lengths, longest=st.integers(25, 60), size=st.integers(1, 6))
def test_padding_and_microbatching_never_change_a_loss(model, tokenizer, lengths, longest, size):
    import torch

    rng = np.random.default_rng(sum(lengths))
    samples = [sample(rng.integers(3, 512, length)) for length in lengths]
    alone = [sums_of(model, tokenizer, [one]) for one in samples]
    batch = batches.collate([*samples, sample([3] * longest, [IGNORED] * longest)], PAD)
    nats, tokens = 0.0, 0
    for part in batches.split(batch, size):
        with torch.no_grad():
            found = batches.response_nats(model, part).double()
        nats, tokens = nats + float(found.sum()), tokens + len(found)
    assert tokens == sum(one.tokens for one in alone)
    assert nats == pytest.approx(sum(one.nats for one in alone), rel=1e-5)


def test_gradients_do_not_depend_on_what_the_head_is_spared(model):
    import torch

    batch = batches.collate([sample([5, 9, 70, 80], [IGNORED, IGNORED, 70, 80]), sample([6, 7], [IGNORED, 7])], PAD)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    mine = gradients(batches.response_nats(model, batch).sum())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    whole = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batches.targets(batch["labels"]).flatten(), ignore_index=IGNORED, reduction="sum"
    )
    for ours, theirs in zip(mine, gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_response_bytes_are_those_of_the_text_without_special_tokens(tokenizer):
    prompt = tokenizer("<|im_start|>user\nWhat?<|im_end|>\n", add_special_tokens=False).input_ids
    answer = tokenizer("naïve ☃ court<|im_end|>", add_special_tokens=False).input_ids
    batch = batches.collate([sample(prompt + answer, [IGNORED] * len(prompt) + answer), sample([5, 6])], PAD)
    assert batches.response_bytes(batch, tokenizer)[0] == len("naïve ☃ court".encode())


def test_standard_error_is_that_of_a_ratio_estimator():
    # Two samples: 2 nats over 1 token, 4 nats over 3 tokens. r = 6/4; residuals 0.5 and -0.5;
    # n/(n-1)·Σ = 2·0.5 = 1; standard error = 1/4.
    sums = batches.LossSums(nats=6, tokens=4, bytes=9, samples=2, nats_squared=20, tokens_squared=10, nats_by_tokens=14)
    loss = sums.loss()
    assert loss.per_token == 1.5
    assert loss.standard_error == pytest.approx(0.25)
    assert batches.LossSums(nats=2, tokens=1, bytes=1, samples=1).loss().standard_error is None


def test_sums_of_a_batch_are_those_it_would_be_added_up_by_hand(tokenizer):
    import torch

    batch = batches.collate([sample([1, 5, 6, 7]), sample([1, 8])], PAD)
    found = batches.LossSums.of(batch, torch.tensor([1.0, 2.0, 3.0, 10.0]), tokenizer)
    assert (found.nats, found.tokens, found.samples) == (16, 4, 2)
    assert (found.nats_squared, found.tokens_squared, found.nats_by_tokens) == (36 + 100, 9 + 1, 18 + 10)


numbers = st.tuples(*[st.integers(0, 1000).map(float)] * 7)


@given(numbers, numbers)
def test_sums_add_up_over_ranks_in_any_order(one, other):
    first, second = batches.LossSums(*one), batches.LossSums(*other)
    assert first + second == second + first == batches.LossSums(*(a + b for a, b in zip(one, other, strict=True)))


def test_a_loss_that_is_not_finite_is_carried_to_whoever_refuses_it():
    loss = batches.LossSums(nats=math.nan, tokens=3, bytes=3, samples=2).loss()
    assert math.isnan(loss.nats)
    assert loss.standard_error is None


def test_held_out_samples_are_the_first_ones_in_order_of_length(monkeypatch, tmp_path):
    rows = [sample([1] * length, name=str(number)) for number, length in enumerate((4, 2, 9, 2, 1))]
    monkeypatch.setattr(batches, "Samples", lambda folder: rows)
    assert [row["sample_id"] for row in batches.held_out(tmp_path, 4)] == ["1", "3", "0", "2"]
    assert len(batches.held_out(tmp_path, None)) == len(batches.held_out(tmp_path, 99)) == 5


def test_a_model_that_is_not_there_is_a_mistake_in_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no safetensors model"):
        batches.load_model(str(tmp_path))


# Packed samples


def pack(samples, length, empty=0):
    """The samples as one packed sample, and so many empty sequences after it."""
    ids, labels = (np.concatenate([one[name] for one in samples]) for name in ("input_ids", "labels"))
    tokens = [len(one["input_ids"]) for one in samples]
    starts = np.cumsum([0, *tokens[:-1]])
    labels[starts] = IGNORED
    rest = length - len(ids)
    sequence = {
        "domains": ",".join(one["domain"] for one in samples),
        "input_ids": np.pad(ids, (0, rest)),
        "labels": np.pad(labels, (0, rest), constant_values=IGNORED),
        "lengths": np.array(tokens, np.int32),
        "position_ids": np.concatenate([np.arange(count, dtype=np.int32) for count in (*tokens, rest)]),
        "sample_ids": ",".join(one["sample_id"] for one in samples),
    }
    blank = {
        "domains": "",
        "input_ids": np.zeros(length, np.int32),
        "labels": np.full(length, IGNORED, np.int32),
        "lengths": np.zeros(1, np.int32),
        "position_ids": np.arange(length, dtype=np.int32),
        "sample_ids": "",
    }
    return [sequence, *[blank] * empty]


def total(model, batch):
    """The summed loss of a batch and how many tokens it is of."""
    import torch

    with torch.no_grad():
        found = batches.response_nats(model, batch).double()
    return float(found.sum()), len(found)


def attending(tiny_model, how):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=how).eval()


@settings(max_examples=15)
@given(
    rows=st.lists(st.lists(st.integers(2, 14), min_size=1, max_size=4), min_size=1, max_size=4),
    empty=st.integers(0, 2),
    cut=st.sampled_from([batches.split, batches.split_in_order]),
    size=st.integers(1, 6),
)
def test_a_packed_batch_has_the_loss_of_its_samples(model, rows, empty, cut, size):
    rng = np.random.default_rng(sum(map(sum, rows)))
    samples = [[sample(rng.integers(3, 512, length)) for length in row] for row in rows]
    expected = [total(model, batches.collate([one], PAD)) for row in samples for one in row]
    batch = batches.collate([packed for row in samples for packed in pack(row, 64, empty)], PAD)
    found = [total(model, part) for part in cut(batch, size)]
    assert sum(tokens for _, tokens in found) == sum(tokens for _, tokens in expected)
    assert sum(nats for nats, _ in found) == pytest.approx(sum(nats for nats, _ in expected), rel=1e-4)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_no_token_of_a_member_moves_the_loss_of_another(tiny_model, how):
    model = attending(tiny_model, how)
    batches.require_apart(model)
    first, other, second = sample([9, 8, 7, 6]), sample([70, 80, 90, 60]), sample([5, 6, 7, 8, 9])
    alone = total(model, batches.collate([second], PAD))
    for before in (first, other):
        nats, tokens = total(model, batches.collate(pack([before, second], 12), PAD))
        mine, count = total(model, batches.collate([before], PAD))
        assert nats == pytest.approx(mine + alone[0], rel=1e-4)
        assert tokens == count + alone[1]


def test_a_model_to_which_members_are_no_strangers_is_refused(model):
    def leaking(position_ids, **inputs):
        return model(**inputs)

    with pytest.raises(ConfigError, match=r"mixture\.packing: function lets the members of a packed sequence see each"):
        batches.require_apart(leaking)


def test_packed_batches_count_their_members_tokens_and_are_cut_to_the_longest_row():
    rows = [*pack([sample([5, 6, 7], name="a"), sample([8, 9], name="b")], 12, empty=1), *pack([sample([4, 4])], 12)]
    batch = batches.collate(rows, PAD)
    assert batch["tokens"] == [5, 0, 2]
    assert batch["sample_ids"] == ["a,b", "", "s"]
    assert {str(batch[name].dtype) for name in ("input_ids", "labels", "position_ids")} == {"torch.int64"}
    found = batches.split(batch, 1)
    assert [(part["sample_ids"], tuple(part["labels"].shape)) for part in found] == [
        ([""], (1, 1)),
        (["s"], (1, 2)),
        (["a,b"], (1, 5)),
    ]
    assert found[2]["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
