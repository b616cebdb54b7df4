"""Tokens carry a loss exactly where the assistant speaks, and every sequence opens and closes once.

One small byte-level tokenizer is varied in the ways in which real ones differ: who writes the start token, which token
ends a turn, and how offsets treat the white space around them.
"""

import copy
import json

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vtmix import encode
from vtmix.encode import PLAIN_TEMPLATE, Encoder, load_tokenizer, tokenizer_digest
from vtmix.errors import ConfigError
from vtmix.mds import IGNORED
from vtmix.records import Invalid, Turn
from vtmix.settings import Encoding

BOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNMARKED_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXCHANGE = (Turn("user", "What is a tort?"), Turn("assistant", "A civil wrong."))
LONG = (
    Turn("system", "Answer as counsel."),
    Turn("user", "What is a tort?"),
    Turn("assistant", "A civil wrong.\n\n    - indented 𝕬😀\n"),
    Turn("user", "And a clause?"),
    Turn("assistant", "A part of a contract."),
)


def adds_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )


def writes_bos(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE


def adds_and_writes_bos(tokenizer):
    adds_bos(tokenizer)
    writes_bos(tokenizer)


def trims_offsets(tokenizer):
    """As GPT-NeoX's and Pythia's do: white space counts as no character of its token."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)


def end_takes_whitespace(tokenizer):
    """As Phi-3's does: the end marker takes the white space after it as its own."""
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(END, special=True, rstrip=True)])


def trims_offsets_without_end_marker(tokenizer):
    trims_offsets(tokenizer)
    no_end_marker(tokenizer)


def several_templates(tokenizer):
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": "{{ tools }}"}


def no_end_marker(tokenizer):
    tokenizer.chat_template = UNMARKED_TEMPLATE


def no_bos(tokenizer):
    tokenizer.bos_token = None


VARIANTS = {
    change.__name__: change
    for change in (adds_bos, writes_bos, adds_and_writes_bos, trims_offsets, end_takes_whitespace, several_templates)
} | {"as_it_is": lambda tokenizer: None}


@pytest.fixture(scope="module")
def tokenizer_with(tiny_model, tmp_path_factory):
    """The tiny model's tokenizer after a change, saved and loaded again."""

    def make(change):
        tokenizer = load_tokenizer(str(tiny_model))
        change(tokenizer)
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        return load_tokenizer(str(folder))

    return make


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def encoder_of(tokenizer, **settings):
    return Encoder(tokenizer, Encoding(**{"max_length": 1 << 20, **settings}))


def spoken(tokenizer, encoded):
    """The text of every labelled stretch."""
    assert len(encoded.input_ids) == len(encoded.labels)
    labelled = encoded.labels != IGNORED
    assert (encoded.labels[labelled] == encoded.input_ids[labelled]).all()
    edges = np.flatnonzero(np.diff(labelled, prepend=False, append=False))
    return [
        tokenizer.decode(encoded.input_ids[start:stop], clean_up_tokenization_spaces=False)
        for start, stop in edges.reshape(-1, 2)
    ]


def answers(turns, end):
    return [turn.content + end for turn in turns if turn.role == "assistant"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("turns", [EXCHANGE, LONG], ids=["exchange", "chat"])
def test_labels_are_the_assistants_turns_with_their_end_markers(tokenizer_with, variant, turns):
    tokenizer = tokenizer_with(VARIANTS[variant])
    assert spoken(tokenizer, encoder_of(tokenizer).encode(turns)) == answers(turns, END)


@pytest.mark.parametrize("turns", [EXCHANGE, LONG], ids=["exchange", "chat"])
def test_the_plain_template_labels_the_same_turns(tokenizer, turns):
    encoded = encoder_of(tokenizer, template="plain").encode(turns)
    assert spoken(tokenizer, encoded) == answers(turns, END)
    assert tokenizer.decode(encoded.input_ids).startswith("Answer as" if turns is LONG else "### Question\nWhat is")


def test_ids_are_those_the_tokenizer_gives_the_chat(tokenizer):
    for turns in (EXCHANGE, LONG):
        encoded = encoder_of(tokenizer).encode(turns)
        assert encoded.input_ids.tolist() == tokenizer.apply_chat_template([turn._asdict() for turn in turns])
        assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


def test_the_chat_template_is_taken_where_there_is_one(tokenizer, tokenizer_with):
    assert encoder_of(tokenizer).template == encoder_of(tokenizer, template="chat").template == CHAT_TEMPLATE
    without = tokenizer_with(lambda tokenizer: setattr(tokenizer, "chat_template", None))
    assert encoder_of(without).template == PLAIN_TEMPLATE
    with pytest.raises(ConfigError, match="the tokenizer has no chat template: use 'plain' or 'auto'"):
        encoder_of(without, template="chat")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)


@given(
    exchanges=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    system=st.none() | TEXT,
    template=st.sampled_from(["chat", "plain"]),
)
def test_of_any_text_the_answers_are_learned_and_the_prompts_never(tokenizer, exchanges, system, template):
    turns = [Turn("system", system)] if system else []
    for question, answer in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer)]
    encoded = encoder_of(tokenizer, template=template).encode(tuple(turns))
    assert spoken(tokenizer, encoded) == [answer + END for _, answer in exchanges]
    assert encoded.response_tokens == np.count_nonzero(encoded.labels != IGNORED)


@pytest.mark.parametrize("variant", ["adds_bos", "writes_bos", "adds_and_writes_bos"])
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_sequence_begins_with_the_start_token_once(tokenizer_with, variant, template):
    tokenizer = tokenizer_with(VARIANTS[variant])
    encoded = encoder_of(tokenizer, template=template).encode(EXCHANGE)
    wanted = variant != "writes_bos" or template == "chat"
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == wanted
    assert (encoded.input_ids[0] == tokenizer.bos_token_id) == wanted
    assert encoded.labels[0] == IGNORED


def test_no_start_token_is_made_up(tokenizer, tokenizer_with):
    for found in (tokenizer, tokenizer_with(no_bos)):
        assert 0 not in encoder_of(found).encode(EXCHANGE).input_ids


@pytest.mark.parametrize("variant", [no_end_marker, trims_offsets_without_end_marker])
def test_a_template_without_end_marker_gets_the_end_token_once(tokenizer_with, variant):
    tokenizer = tokenizer_with(variant)
    encoded = encoder_of(tokenizer).encode(LONG)
    assert spoken(tokenizer, encoded) == [LONG[2].content.rstrip(), LONG[4].content + END]
    assert encoded.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_a_token_that_takes_the_templates_newline_keeps_the_end_of_the_answer():
    """A token such as `.\\n` holds the last character of an answer and the newline the template writes after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([".\n"] * 9, trainer)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=BOS)
    tokenizer.chat_template = UNMARKED_TEMPLATE
    assert len(tokenizer(".\n").input_ids) == 1
    encoded = encoder_of(tokenizer).encode(LONG)
    assert spoken(tokenizer, encoded) == [LONG[2].content.rstrip(), LONG[4].content + "\n" + BOS]


def test_an_unknown_character_does_not_pass_for_an_end_marker():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = UNMARKED_TEMPLATE
    encoded = encoder_of(tokenizer).encode((Turn("user", "a"), Turn("assistant", "a ☃")))
    assert encoded.labels.tolist()[-3:] == [2, 0, 1]


def test_what_follows_the_last_answer_is_left_out(tokenizer):
    followed = encoder_of(tokenizer).encode((*EXCHANGE, Turn("user", "Thanks.")))
    assert followed.input_ids.tolist() == encoder_of(tokenizer).encode(EXCHANGE).input_ids.tolist()


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    encoded = encoder_of(tokenizer).encode((Turn("assistant", "Good day."), *EXCHANGE))
    assert spoken(tokenizer, encoded) == ["Good day." + END, "A civil wrong." + END]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_overlong_samples_are_cut_at_the_end(tokenizer, template):
    whole = encoder_of(tokenizer, template=template).encode(EXCHANGE)
    assert not whole.truncated
    exact = encoder_of(tokenizer, template=template, max_length=len(whole.input_ids)).encode(EXCHANGE)
    assert not exact.truncated
    first = int(np.argmax(whole.labels != IGNORED))
    for length in range(8, len(whole.input_ids)):
        encoded = encoder_of(tokenizer, template=template, max_length=length).encode(EXCHANGE)
        if length <= first:
            assert encoded is None
        else:
            assert encoded.truncated
            assert encoded.input_ids.tolist() == whole.input_ids[:length].tolist()
            assert encoded.labels.tolist() == whole.labels[:length].tolist()


def test_the_first_token_is_never_predicted_and_so_never_counted():
    labels = np.array([5, 6, IGNORED, 7], np.int32)
    assert encode.Encoded(labels, labels, truncated=False).response_tokens == 2


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", [BOS, START, END])
def test_a_turn_that_spells_a_special_token_is_refused(tokenizer, role, token):
    turns = [Turn("system", "a"), *EXCHANGE]
    number = [turn.role for turn in turns].index(role)
    turns[number] = Turn(role, f"a{token}b")
    for template in ("chat", "plain"):
        with pytest.raises(Invalid) as error:
            encoder_of(tokenizer, template=template).encode(tuple(turns))
        assert str(error.value) == f"the {role} turn spells the special token '{token}', which would end or open a turn"


def test_special_tokens_that_only_the_template_knows_are_refused_and_others_are_not(tokenizer_with):
    """Llama 3 opens turns with tokens that `all_special_tokens` does not list; SmolLM2 has one spelt <filename>."""

    def change(tokenizer):
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<turn>", "<filename>")])
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "<turn>").replace("<|im_end|>", "<turn>")

    tokenizer = tokenizer_with(change)
    assert not {"<turn>", "<filename>"} & set(tokenizer.all_special_tokens)
    encoder = encoder_of(tokenizer)
    with pytest.raises(Invalid, match="spells the special token '<turn>'"):
        encoder.encode((Turn("user", "a <turn> b"), EXCHANGE[1]))
    encoded = encoder.encode((Turn("user", "usage: cp <filename>"), EXCHANGE[1]))
    assert spoken(tokenizer, encoded) == ["A civil wrong.<turn>"]
    assert tokenizer.eos_token_id not in encoded.input_ids


def test_a_template_that_rewrites_history_is_refused_where_it_matters(tokenizer_with):
    encoder = encoder_of(tokenizer_with(lambda tokenizer: setattr(tokenizer, "chat_template", FORGETFUL_TEMPLATE)))
    assert encoder.encode(EXCHANGE) is not None
    with pytest.raises(Invalid, match=r"does not render turn after turn, .*: set encoding.template to 'plain'"):
        encoder.encode(LONG)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turns, please') }}", "no system turns, please"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
    ],
)
def test_a_template_that_refuses_says_why(tokenizer_with, template, reason):
    encoder = encoder_of(tokenizer_with(lambda tokenizer: setattr(tokenizer, "chat_template", template)))
    with pytest.raises(Invalid, match=f"^the chat template refuses the conversation: {reason}"):
        encoder.encode(EXCHANGE)


def test_a_template_that_writes_the_date_gives_the_same_sample_on_any_day(tokenizer_with):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    tokenizer = tokenizer_with(lambda tokenizer: setattr(tokenizer, "chat_template", dated))
    assert tokenizer.decode(encoder_of(tokenizer).encode(EXCHANGE).input_ids).startswith("01 Jan 2025<|im_start|>user")


def test_a_batch_gives_what_each_conversation_gives_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 3)
    encoder = encoder_of(tokenizer, max_length=len(encoder_of(tokenizer).encode(LONG).input_ids) - 3)
    refused, overlong = (Turn("user", START), EXCHANGE[1]), (Turn("user", "a" * 999), EXCHANGE[1])
    batch = [EXCHANGE, refused, LONG, overlong, EXCHANGE, LONG, refused, refused, refused, EXCHANGE]
    found = list(encoder.encode_all(batch))
    assert [type(outcome) for outcome in found] == [
        {refused: Invalid, overlong: type(None)}.get(turns, encode.Encoded) for turns in batch
    ]
    for turns, outcome in zip(batch, found, strict=True):
        if isinstance(outcome, encode.Encoded):
            alone = encoder.encode(turns)
            assert outcome.input_ids.tolist() == alone.input_ids.tolist()
            assert outcome.labels.tolist() == alone.labels.tolist()
            assert outcome.truncated == alone.truncated


def test_the_digest_is_of_the_vocabulary_and_the_template_alone(tokenizer, tokenizer_with):
    digest = tokenizer_digest(tokenizer)
    used = copy.deepcopy(tokenizer)
    used("a text", truncation=True, max_length=3, padding="max_length")
    assert used.backend_tokenizer.truncation
    assert tokenizer_digest(used) == digest
    assert tokenizer_digest(tokenizer_with(lambda tokenizer: None)) == digest
    others = [tokenizer_digest(tokenizer_with(change)) for change in (no_end_marker, no_bos, adds_bos)]
    assert len({digest, *others}) == 4


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", "{}", "no tokenizer at '.*': "),
        ("tokenizer.json", None, "no tokenizer at '.*': "),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), "has no eos_token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_a_configuration_error(tokenizer, tmp_path, file, content, reason):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=f"^model: .*{reason}"):
        load_tokenizer(str(tmp_path))


def test_a_place_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"^model: no tokenizer at '{tmp_path}': "):
        load_tokenizer(str(tmp_path))
