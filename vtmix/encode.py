"""Conversation → token ids and labels, by the tokenizer's chat template or a plain one.

Labels are -100 outside assistant turns. The conversation is rendered once and tokenised once; which tokens belong to an
assistant turn follows from character offsets, so a multi-turn conversation is labelled like a single exchange.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vtmix.config import Encoding
from vtmix.errors import ConfigError
from vtmix.mds import IntArray
from vtmix.records import Conversation, Invalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100

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
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
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
    content = {
        "backend": json.loads(tokenizer.backend_tokenizer.to_str()),
        "chat_template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    # Truncation and padding are states of a call, not of the vocabulary.
    content["backend"].pop("truncation", None)
    content["backend"].pop("padding", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        self.template = PLAIN_TEMPLATE if plain else tokenizer.chat_template
        self._specials = tuple(token for token in tokenizer.all_special_tokens if token)
        ids = tokenizer("").input_ids
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and ids[:1] == [bos] else None

    def encode(self, turns: Conversation) -> Encoded | None:
        """Ids and labels, cut at max_length; None when no response token is left within it.

        Raises Invalid when a turn spells a special token, or the template does not render turn after turn.
        """
        self._refuse_special_text(turns)
        text, spans = self._render(turns)
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(tokens.input_ids, np.int32)
        offsets = np.array(tokens.offset_mapping, np.int64).reshape(-1, 2)
        labels = np.full_like(ids, IGNORED)
        for start, stop in spans:
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
            labels[inside] = ids[inside]
        return self._fit(*self._close(*self._open(ids, labels)))

    def _render(self, turns: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the characters [start, stop) of each assistant turn with its end marker."""
        text = self._apply(turns)
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._apply(turns[:number], prompt=True)
            after = self._apply(turns[: number + 1])
            if not text.startswith(after.rstrip()) or not after.startswith(before):
                raise Invalid(
                    "the chat template does not render turn after turn, so its responses cannot be told apart: "
                    "set encoding.template to 'plain'"
                )
            spans.append((len(before), len(after.rstrip())))
        return text, spans

    def _apply(self, turns: Conversation, *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        messages = [turn._asdict() for turn in turns]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise Invalid(f"the chat template refuses the conversation: {error}") from None
        return str(text)

    def _refuse_special_text(self, turns: Conversation) -> None:
        for turn in turns:
            found = next((token for token in self._specials if token in turn.content), None)
            if found:
                raise Invalid(
                    f"the {turn.role} turn spells the special token {found!r}, which would end or open a turn"
                )

    def _open(self, ids: IntArray, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Makes the sequence begin with the start token exactly once, where the tokenizer wants one."""
        if self._bos is None:
            return ids, labels
        leading = int(np.argmax(ids != self._bos)) if (ids != self._bos).any() else len(ids)
        start = np.array([self._bos], np.int32)
        return np.concatenate([start, ids[leading:]]), np.concatenate([start * 0 + IGNORED, labels[leading:]])

    def _close(self, ids: IntArray, labels: IntArray) -> tuple[IntArray, IntArray]:
        """Makes every response end with an end token exactly once: the template's own, else the tokenizer's eos."""
        labelled = np.flatnonzero(labels != IGNORED)
        if len(labelled) and int(ids[labelled[-1]]) in self._tokenizer.all_special_ids:
            return ids, labels
        end = np.array([self._tokenizer.eos_token_id], np.int32)
        last = int(labelled[-1]) + 1 if len(labelled) else len(ids)
        return np.concatenate([ids[:last], end]), np.concatenate([labels[:last], end])

    def _fit(self, ids: IntArray, labels: IntArray) -> Encoded | None:
        truncated = len(ids) > self._max_length
        encoded = Encoded(ids[: self._max_length], labels[: self._max_length], truncated)
        return encoded if encoded.response_tokens else None
