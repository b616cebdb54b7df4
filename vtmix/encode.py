"""Conversation → token ids and labels, by the tokenizer's chat template or a plain one.

Labels are -100 outside assistant turns. A conversation is tokenised as a whole; which tokens belong to an assistant
turn follows from character offsets, so a multi-turn conversation is labelled like a single exchange.
"""

import copy
import datetime
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vtmix.errors import ConfigError
from vtmix.mds import IGNORED, IntArray
from vtmix.records import Conversation, Invalid
from vtmix.settings import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 256
"""Conversations tokenised by one call, which is several times as fast as one by one, and uses every core."""

TODAY = datetime.date(2025, 1, 1)
"""What a chat template that writes today's date gets (Llama 3.2, gpt-oss), since equal records are equal samples."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Answer\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% elif message['role'] == 'user' %}### Question\n{{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Answer\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of equal length; `truncated` when the overlong rule cut the end."""

    input_ids: IntArray
    labels: IntArray
    truncated: bool

    @property
    def response_tokens(self) -> int:
        """Tokens that carry a loss. The first token of a sequence is never predicted."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


def load_tokenizer(location: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a model folder or hub name.

    Raises ConfigError when there is none, or when it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises Exception itself
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"model: no tokenizer at {location!r}: {reason}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"model: {location!r} has no fast tokenizer (tokenizer.json), which character offsets need")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model: the tokenizer of {location!r} has no eos_token: set one in its tokenizer_config.json"
        )
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of everything that decides how text becomes ids."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:  # states of a call, not of the vocabulary
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    content = {
        "backend": backend.to_str(),
        "chat_template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _turn_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """The special tokens that must not stand in a text, and their ids: those with a role, and those a template writes.

    Llama 3 and Gemma open turns with tokens that are special but not among `all_special_tokens`.
    """
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    written = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in str(tokenizer.chat_template)
    }
    return {token: number for token, number in [*named, *written.items()] if token}


class _Rendered(NamedTuple):
    """A conversation as text, and the characters [start, stop) of each assistant turn with its end marker."""

    text: str
    spans: list[tuple[int, int]]


class Encoder:
    """Encodes conversations with one tokenizer and one template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", settings: Encoding) -> None:
        """Raises ConfigError when the chat template is asked for and the tokenizer has none."""
        if settings.template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "encoding.template is 'chat' but the tokenizer has no chat template: use 'plain' or 'auto'"
            )
        self._tokenizer = tokenizer
        self._max_length = settings.max_length
        plain = settings.template == "plain" or not tokenizer.chat_template
        self.template: str = PLAIN_TEMPLATE if plain else tokenizer.get_chat_template()
        self._template_variables = {**tokenizer.special_tokens_map, "strftime_now": TODAY.strftime}
        specials = _turn_tokens(tokenizer)
        self._special_text = re.compile("|".join(map(re.escape, specials)))
        self._eos = tokenizer.eos_token_id
        # An unknown character at the end of a response ends nothing.
        self._end_ids = set(specials.values()) - {tokenizer.unk_token_id} | {self._eos}
        ids = tokenizer("").input_ids
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and ids[:1] == [bos] else None

    def encode(self, turns: Conversation) -> Encoded | None:
        """Ids and labels, cut at max_length; None when no response token is left within it.

        Raises Invalid when a turn spells a special token, or the template does not render turn after turn.
        """
        (encoded,) = self.encode_all([turns])
        if isinstance(encoded, Invalid):
            raise encoded
        return encoded

    def encode_all(self, conversations: Iterable[Conversation]) -> Iterator[Encoded | Invalid | None]:
        """What `encode` gives for each conversation, in order; Invalid is given where it would be raised."""
        rest = iter(conversations)
        while batch := list(islice(rest, BATCH)):
            yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[Conversation]) -> Iterator[Encoded | Invalid | None]:
        rendered = [self._render_or_refuse(turns) for turns in batch]
        texts = [found.text for found in rendered if isinstance(found, _Rendered)]
        encodings = iter(self._tokenise(texts))
        for found in rendered:
            yield found if isinstance(found, Invalid) else self._label(next(encodings), found.spans)

    def _render_or_refuse(self, turns: Conversation) -> _Rendered | Invalid:
        try:
            self._refuse_special_text(turns)
            return self._render(turns)
        except Invalid as invalid:
            return invalid

    def _render(self, turns: Conversation) -> _Rendered:
        """What follows the last assistant turn is left out, since nothing is learned from it."""
        messages = [turn._asdict() for turn in turns]
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        text = self._apply(messages[: answers[-1] + 1])
        spans = []
        for number in answers:
            before = self._apply(messages[:number], prompt=True)
            after = text if number == answers[-1] else self._apply(messages[: number + 1])
            stop = len(after.rstrip())
            if not after.startswith(before) or not text.startswith(after[:stop]):
                raise Invalid(
                    "the chat template does not render turn after turn, so its responses cannot be told apart: "
                    "set encoding.template to 'plain'"
                )
            spans.append((len(before), stop))
        return _Rendered(text, spans)

    def _apply(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """What `apply_chat_template` gives, without looking up every special token on each call, and on any day."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                [messages], chat_template=self.template, add_generation_prompt=prompt, **self._template_variables
            )
        except (TemplateError, TypeError) as error:
            raise Invalid(f"the chat template refuses the conversation: {error}") from None
        return str(text)

    def _refuse_special_text(self, turns: Conversation) -> None:
        for turn in turns:
            if found := self._special_text.search(turn.content):
                raise Invalid(
                    f"the {turn.role} turn spells the special token {found[0]!r}, which would end or open a turn"
                )

    def _tokenise(self, texts: list[str]) -> list[Any]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings: list[Any] = encoded.encodings
        return encodings

    def _label(self, encoding: Any, spans: list[tuple[int, int]]) -> Encoded | None:
        ids = np.array(encoding.ids, np.int32)
        labels = np.full(len(ids), IGNORED, np.int32)
        offsets: list[tuple[int, int]] = encoding.offsets
        for start, stop in spans:
            # A token belongs to the turn in which it begins: one that takes the template's whitespace after a response
            # with it still holds the end of the response. Of those that begin where the turn does, one of no width is
            # whitespace that stands before it (some tokenizers trim offsets).
            inside = slice(bisect_left(offsets, (start, start + 1)), bisect_left(offsets, (stop,)))
            labels[inside] = ids[inside]
        return self._fit(*self._close(*self._open(ids, labels)))

    def _open(self, ids: IntArray, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Makes the sequence begin with the start token exactly once, where the tokenizer wants one."""
        if self._bos is None:
            return ids, labels
        rest = slice(int(np.argmax(ids != self._bos)), None)  # what the template wrote is dropped
        return np.insert(ids[rest], 0, self._bos), np.insert(labels[rest], 0, IGNORED)

    def _close(self, ids: IntArray, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Makes every response end with an end token exactly once: the template's own, else the tokenizer's eos."""
        labelled = np.flatnonzero(labels != IGNORED)
        if len(labelled) and int(ids[labelled[-1]]) in self._end_ids:
            return ids, labels
        rest = slice(int(labelled[-1]) + 1 if len(labelled) else len(ids))
        return np.append(ids[rest], np.int32(self._eos)), np.append(labels[rest], np.int32(self._eos))

    def _fit(self, ids: IntArray, labels: IntArray) -> Encoded | None:
        truncated = len(ids) > self._max_length
        encoded = Encoded(ids[: self._max_length], labels[: self._max_length], truncated)
        return encoded if encoded.response_tokens else None
