"""What a judge is asked about a text, and what its answer says: pure functions between text and probabilities.

The domains are put as options behind markers (A, B, …), and the judge answers with one token. No answer is sampled: the
probabilities of the markers as that token are read off. Mass on any other token is unclassified, the share of sampled
answers that would have been none. Asked in several orders of the options, a preference for a place averages out.
"""

import math
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vtmix.classify import Matrix, blank
from vtmix.encode import TODAY
from vtmix.errors import ConfigError, listing
from vtmix.settings import Endpoint, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT = (
    "Which of these subjects is the text below about?\n\n{options}\n\nText:\n{text}\n\n"
    "Reply with the label of one subject and with nothing else."
)
ANSWER = "\nAnswer:"
"""What ends the prompt of a model that has no chat template."""

SPACES = " \u2581\u0120"
"""How the space before a word is spelled in tokens, by servers that show them raw too."""


@dataclass(frozen=True)
class Inquiry:
    """A question ready to be put about any text: what `Question` says, with every default filled in.

    `orders[i][j]` is the domain that stands at place j, behind marker j, when it is asked for the i-th time.
    """

    prompt: str
    options: tuple[str, ...]
    markers: tuple[str, ...]
    orders: tuple[tuple[int, ...], ...]
    characters: int

    def ask(self, text: str) -> list[str]:
        """The prompts about a text, one per order; none about a blank one. Long texts are cut."""
        text = text[: self.characters].encode(errors="replace").decode()  # a lone surrogate cannot be sent
        return [] if blank(text) else [self.render(order, text) for order in self.orders]

    def render(self, order: tuple[int, ...], text: str) -> str:
        """The prompt about a text, with the options in this order."""
        lines = [f"{marker}. {self.options[domain]}" for marker, domain in zip(self.markers, order, strict=True)]
        fields = {"{options}": "\n".join(lines), "{text}": text}
        # In one pass: a text may hold braces, and the name of a field.
        return re.sub("|".join(map(re.escape, fields)), lambda field: fields[field[0]], self.prompt)

    def tally(self, answers: npt.ArrayLike) -> Matrix:
        """Marker probabilities by place (n, p, k), zeros where there was no answer → rows (n, k + 1) that sum to 1.

        A turn with a number that is none was no answer: half precision overflows.
        """
        found = np.asarray(answers, np.float64).reshape(-1, len(self.orders), len(self.options))
        found = np.clip(np.where(np.isfinite(found).all(axis=2, keepdims=True), found, 0), 0, 1)
        shares = np.zeros((len(found), len(self.options)))
        for turn, order in enumerate(self.orders):
            shares[:, order] += found[:, turn] / len(self.orders)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
        return np.hstack([shares, np.maximum(1 - shares.sum(axis=1, keepdims=True), 0)])


def inquiry(settings: Question, domains: Sequence[str], characters: int) -> Inquiry:
    """The question that settings describe, about these domains; of a text, its first `characters` are shown.

    Raises ConfigError naming everything in the settings that does not fit the domains.
    """
    count = len(domains)
    prompt = PROMPT if settings.prompt is None else settings.prompt
    markers = tuple(string.ascii_uppercase[:count]) if settings.markers is None else settings.markers
    wrong = [f"prompt has no {field}, expected it once" for field in ("{text}", "{options}") if field not in prompt]
    if foreign := [name for name in settings.options if name not in domains]:
        wrong.append(f"options name {', '.join(map(repr, foreign))}, expected only domains: {', '.join(domains)}")
    if len(markers) != count:
        wrong.append(f"{len(markers)} markers found, expected one for each of the {count} domains: set markers")
    if bad := [marker for marker in markers if marker != marker.strip() or not marker]:
        wrong.append(f"markers {', '.join(map(repr, bad))} are blank or begin or end with whitespace")
    if twice := sorted({marker for marker in markers if markers.count(marker) > 1}):
        wrong.append(f"markers {', '.join(map(repr, twice))} stand for more than one domain")
    if isinstance(settings, Endpoint) and (alike := _beginnings(markers)):
        wrong.append(f"markers {alike} begin alike, and a server may answer with a part of one: set others, as A, B, …")
    if settings.permutations > count:
        wrong.append(f"permutations is {settings.permutations}, expected at most the number of domains ({count})")
    if wrong:
        raise ConfigError(listing(f"detection.classifier: {line}" for line in wrong))
    return Inquiry(
        prompt=prompt,
        options=tuple(settings.options.get(name, name) for name in domains),
        markers=markers,
        orders=rotations(count, settings.permutations),
        characters=characters,
    )


def _beginnings(markers: Sequence[str]) -> str:
    """The pairs of different markers of which one begins the other, as an error names them."""
    pairs = [(one, other) for one in markers if one for other in markers if one != other and other.startswith(one)]
    return ", ".join(f"{one!r} and {other!r}" for one, other in pairs)


def rotations(count: int, turns: int) -> tuple[tuple[int, ...], ...]:
    """`turns` orders of `count` things, each the first one rotated, evenly spaced: with turns = count, everything
    stands at every place once.
    """
    return tuple(tuple((place + turn * count // turns) % count for place in range(count)) for turn in range(turns))


def marker_tokens(tokenizer: "PreTrainedTokenizerFast", markers: Sequence[str]) -> list[list[int]]:
    """Per marker, the ids of the tokens that are read as it: the first of its own, and each that is it as a whole.

    With and without a space: SentencePiece puts one before a text, but an answer that begins a line has none.
    Raises ConfigError naming the markers that begin with the same token.
    """
    first: dict[int, str] = {}
    for marker in markers:
        ids = tokenizer(marker, add_special_tokens=False).input_ids
        if not ids:
            raise ConfigError(f"detection.classifier: the judge's tokenizer has no token for marker {marker!r}")
        if other := first.get(ids[0]):
            raise ConfigError(
                f"detection.classifier: markers {other!r} and {marker!r} begin with the same token of the judge's "
                "tokenizer, so their answers cannot be told apart: set markers to others, such as single letters"
            )
        first[ids[0]] = marker
    vocabulary = tokenizer.get_vocab()
    tokens = [[own] for own in first]
    taken = set(first)
    for place, marker in enumerate(markers):
        spaced = tokenizer(f" {marker}", add_special_tokens=False).input_ids
        spelled = [vocabulary.get(space + marker) for space in ("", *SPACES)]
        for one in [*spaced[: len(spaced) == 1], *spelled]:
            # As spelled in the vocabulary it may be another: bytes are spelled as letters there.
            if one is not None and one not in taken and tokenizer.decode([one]).strip() == marker:
                tokens[place].append(one)
                taken.add(one)
    return tokens


def prompt_tokens(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """A prompt as an OpenAI-compatible server encodes it, which leaves the start token to a chat template there is."""
    chat = tokenizer.chat_template
    if chat:
        # A model that thinks would answer with the beginning of a thought; templates of others ignore the variable.
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            strftime_now=TODAY.strftime,
        )
    ids: list[int] = tokenizer(prompt if chat else prompt + ANSWER, add_special_tokens=not chat).input_ids
    return ids


def without_turns(tokenizer: "PreTrainedTokenizerFast", text: str) -> str:
    """A text without what the tokenizer reads as special, so that none can end the question and answer it.

    Tokens that a chat template writes are among them, as they are not called special in every tokenizer.
    """
    added = tokenizer.added_tokens_decoder.values()
    spelled = {token.content for token in added if token.special or token.content in str(tokenizer.chat_template)}
    marks = re.compile("|".join(re.escape(mark) for mark in sorted(spelled, key=len, reverse=True) if mark.strip()))
    # Until none is left: what stands around one may be another.
    while marks.pattern and (found := marks.sub(" ", text)) != text:
        text = found
    return text


def marker_probabilities(pairs: Iterable[tuple[str, float]], markers: Sequence[str]) -> list[float]:
    """The probability of each marker: of the tokens that are it or, where no other begins alike, its beginning."""
    shares = [0.0] * len(markers)
    for token, value in pairs:
        text = token.lstrip(SPACES)
        meant = [text] if text in markers else [marker for marker in markers if text and marker.startswith(text)]
        if len(meant) == 1:
            shares[markers.index(meant[0])] += math.exp(value)
    return shares
