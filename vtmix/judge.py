"""Classifiers that ask a language model: in vLLM, or behind an OpenAI-compatible server.

What they ask, and what an answer says, is vtmix/question.py's. A text costs one forward pass per order of the options.
"""

import asyncio
import ipaddress
import json
import math
import os
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from vtmix import engine
from vtmix.classify import Matrix
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, DetectionError
from vtmix.generate import context_of, model_config
from vtmix.question import ANSWER, inquiry, marker_probabilities, marker_tokens, prompt_tokens, without_turns
from vtmix.settings import Endpoint, Judge

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TOP = 20
"""Log-probabilities that an OpenAI-compatible server gives at most: of the likeliest tokens."""

ROUNDING = 1e-3
"""By how much a log-probability may exceed 0, or probabilities 1, since servers round them."""

ABOUT_THE_PROMPT = frozenset({400, 413, 422})
"""Status codes of a request refused for what is in it: a text too long, or not to the server's taste."""

RETRIED = frozenset({408, 409, 429})
"""Status codes, beside 500 and above, after which the request is made again."""

FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED = 0.5, 60.0, 600.0
"""Seconds before a request is made again: at first, after many failures, and at most where the server says how long."""


class VllmJudge:
    """A judge in vLLM, in this process: its interpreter is the one of vLLM's environment."""

    def __init__(
        self,
        settings: Judge,
        location: str,
        revision: str | None,
        precision: engine.Precision,
        domains: Sequence[str],
        characters: int,
    ) -> None:
        """Raises ConfigError when the question cannot be asked of this model, or vLLM cannot load it."""
        self._inquiry = inquiry(settings, domains, characters)
        self._tokenizer = load_tokenizer(location, revision)
        self._tokens = marker_tokens(self._tokenizer, self._inquiry.markers)
        self._longest = self._longest_prompt(context_of(model_config(location, revision)))
        self._engine = engine.start(location, revision, precision, self._longest + 1, settings)

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities (n, k + 1); a blank text is wholly unclassified."""
        from vllm import SamplingParams

        shown = [without_turns(self._tokenizer, text) for text in texts]
        prompts = {(row, turn): ids for row, text in enumerate(shown) for turn, ids in enumerate(self._prompts(text))}
        # Of the model's own softmax, whatever the one token that has to be drawn beside them.
        wanted = [token for tokens in self._tokens for token in tokens]
        settings = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=wanted, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts.values()]
        outputs = self._engine.generate(asked, settings, use_tqdm=False) if asked else []
        answers = np.zeros((len(texts), len(self._inquiry.orders), len(self._tokens)))
        for place, output in zip(prompts, outputs, strict=True):
            found = output.outputs[0].logprobs[0]
            answers[place] = [sum(np.exp(found[token].logprob) for token in tokens) for tokens in self._tokens]
        return self._inquiry.tally(answers)

    def _prompts(self, text: str) -> list[list[int]]:
        """The prompts about a text, cut as far as the judge's context makes necessary."""
        prompts = [prompt_tokens(self._tokenizer, prompt) for prompt in self._inquiry.ask(text)]
        if max(map(len, prompts), default=0) <= self._longest:
            return prompts
        return self._prompts(text[: min(len(text), self._inquiry.characters) // 2])

    def _longest_prompt(self, context: int | None) -> int:
        """Tokens: a question and a text of a token per character, if the context holds as many."""
        empty = [self._inquiry.render(order, "") for order in self._inquiry.orders]
        asked = max(len(prompt_tokens(self._tokenizer, prompt)) for prompt in empty)
        if context is not None and asked >= context:
            raise ConfigError(
                f"detection.classifier: the question without a text is {asked} tokens, and the judge's context holds "
                f"{context}: shorten prompt and options, or take another model"
            )
        longest = asked + self._inquiry.characters
        return longest if context is None else min(longest, context - 1)


class EndpointJudge:
    """A judge behind an OpenAI-compatible server. It holds no key: that is read from the environment for each call."""

    def __init__(self, settings: Endpoint, domains: Sequence[str], characters: int) -> None:
        """Raises ConfigError when the question does not fit the domains, or the key is not in the environment."""
        self._settings = settings
        self._inquiry = inquiry(settings, domains, characters)
        self._tried = False
        _key(settings)

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities (n, k + 1); a blank text is wholly unclassified, and so is an answer that cannot be read.

        Raises DetectionError when the server refuses, gives no log-probabilities, or stays silent after all retries.
        """
        prompts = {
            (row, turn): prompt for row, text in enumerate(texts) for turn, prompt in enumerate(self._inquiry.ask(text))
        }
        answers = np.zeros((len(texts), len(self._inquiry.orders), len(self._inquiry.markers)))
        found = asyncio.run(self._ask_all(prompts.values())) if prompts else []
        for place, answer in zip(prompts, found, strict=True):
            answers[place] = answer
        return self._inquiry.tally(answers)

    async def _ask_all(self, prompts: Collection[str]) -> list[list[float]]:
        """Per prompt, the probability of each marker, in order; zeros where no answer can be read."""
        from openai import AsyncOpenAI

        settings = self._settings
        # How long a request may take, and when it is made again, is for _send to say: the client's timeout is one for
        # each piece of a reply, and it gives up where a server asks for a pause of more than two minutes.
        async with AsyncOpenAI(base_url=settings.url, api_key=_key(settings), timeout=None, max_retries=0) as client:
            await self._try_once(client)
            turns = asyncio.Semaphore(settings.concurrency)
            tasks = [asyncio.create_task(self._ask(client, prompt, turns)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:  # one refusal ends them all
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _try_once(self, client: "AsyncOpenAI") -> None:
        """Raises DetectionError when the server does not answer as it has to about a text that is beyond reproach."""
        if not self._tried and not read_reply(await self._send(client, self._inquiry.ask("A text.")[0])):
            raise DetectionError(
                f"the judge at {self._settings.url} replies without log-probabilities, from which answers are "
                "read: take a server that gives them, or another detection.classifier.api"
            )
        self._tried = True

    async def _ask(self, client: "AsyncOpenAI", prompt: str, turns: asyncio.Semaphore) -> list[float]:
        async with turns:
            reply = await self._send(client, prompt)
        return marker_probabilities(read_reply(reply), self._inquiry.markers)

    async def _send(self, client: "AsyncOpenAI", prompt: str) -> bytes:
        """The server's reply to a prompt, as it came; empty where it refuses the prompt, but did answer another."""
        settings = self._settings
        attempt = 0
        while True:
            found = await self._attempt(client, prompt)
            if isinstance(found, bytes):
                return found
            if self._tried and found.status in ABOUT_THE_PROMPT:
                return b""
            if not found.passing or attempt == settings.retries:
                break
            await asyncio.sleep(pause(attempt, found.asked_for))
            attempt += 1
        problem = f"does not answer after {settings.retries} retries" if found.passing else "refuses to answer"
        raise DetectionError(
            f"the judge at {settings.url} {problem}: {found.reason}: see to url, "
            f"model, api and key (the variable {settings.key}) of detection.classifier, and run again"
        )

    async def _attempt(self, client: "AsyncOpenAI", prompt: str) -> "bytes | _Failure":
        """One request. A failure is returned, not raised: the client's errors hold the request, and with it the key."""
        import openai

        try:
            async with asyncio.timeout(self._settings.timeout):
                return await self._request(client, prompt)
        except TimeoutError:
            return _Failure(f"no whole reply within {self._settings.timeout:g} s")
        except openai.APIStatusError as error:
            asked_for = error.response.headers.get("retry-after", "")
            return _Failure(self._without_key(str(error)), error.status_code, asked_for)
        except openai.OpenAIError as error:
            return _Failure(self._without_key(f"{error} {error.__cause__ or ''}"))

    async def _request(self, client: "AsyncOpenAI", prompt: str) -> bytes:
        settings = self._settings
        # At temperature 1, servers that apply it to log-probabilities leave them as they are.
        common: dict[str, Any] = {"model": settings.model, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        common["extra_body"] = settings.extra_body
        if settings.api == "chat":
            message = {"role": "user", "content": prompt}
            reply = await client.chat.completions.with_raw_response.create(
                messages=[message], logprobs=True, top_logprobs=TOP, **common
            )
        else:
            reply = await client.completions.with_raw_response.create(prompt=prompt + ANSWER, logprobs=TOP, **common)
        content: bytes = reply.http_response.content
        return content

    def _without_key(self, message: str) -> str:
        """A message in one short line: servers repeat what they are sent."""
        line = " ".join(message.split())
        key = os.environ.get(self._settings.key, "").strip()
        return (line.replace(key, "…") if key else line)[: engine.LONGEST_REASON]


class _Failure(NamedTuple):
    """Why there is no reply: the server's status, None where it gave none, and the pause it asks for (Retry-After)."""

    reason: str
    status: int | None = None
    asked_for: str = ""

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status is None or self.status in RETRIED or self.status >= 500


def pause(attempt: int, asked_for: str) -> float:
    """Seconds to wait after the attempt of this number, from 0: at least as many as the server asks for.

    They grow, and half of them is chance: requests that failed together are not to come together again.
    """
    growing = min(FIRST_PAUSE * 2.0 ** min(attempt, 30), LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311
    # Retry-After may be a date too, which is not heeded: the pauses grow in any case.
    return max(growing, min(float(asked_for), LONGEST_ASKED)) if asked_for.isdecimal() else growing


def read_reply(reply: bytes) -> list[tuple[str, float]]:
    """The likeliest first tokens of an answer and their log-probabilities; none when the reply does not hold them.

    It is a chat completion or a completion as OpenAI's API reference describes them, or whatever a server sends.
    """
    try:
        found = json.loads(reply)["choices"][0]["logprobs"]
        if "content" in found:
            pairs = [(top["token"], float(top["logprob"])) for top in found["content"][0]["top_logprobs"]]
        else:
            pairs = [(token, float(value)) for token, value in found["top_logprobs"][0].items()]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    sound = all(isinstance(token, str) and value <= ROUNDING for token, value in pairs)  # nan is not
    return pairs if sound and sum(math.exp(value) for _, value in pairs) <= 1 + ROUNDING else []


def _key(settings: Endpoint) -> str:
    """The key to send. Raises ConfigError, which does not show it, when there is none that can be sent."""
    key = os.environ.get(settings.key, "").strip()
    if not key and not _is_loopback(urlsplit(settings.url).hostname or ""):
        raise ConfigError(
            f"the environment variable {settings.key} is not set, expected it to hold the key for the judge at "
            f"{settings.url}: export it where detection runs, or name another in detection.classifier.key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {settings.key} holds characters that no key has: set it anew")
    return key or "none"  # what runs on this machine mostly asks for none, but the client has to send one


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
