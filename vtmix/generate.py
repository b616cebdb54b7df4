"""Samples from a base model, given its start token alone (Algorithm 1), with transformers or vLLM.

A sample is drawn from the model's own distribution: temperature 1, no top-p, top-k or penalties, whatever the model's
generation_config says. Each has a seed of its own, a hash of (run seed, iteration, index), so it is the same sample
whichever worker draws it and whatever is drawn beside it; what is generated together is always one whole block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vtmix import engine
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, DetectionError
from vtmix.samples import Sample
from vtmix.settings import MixtureConfig, Vllm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# Given to generation engines and recorded in detections: the model's own distribution, nothing bent.
DECODING = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "repetition_penalty": 1.0}


Openings = Sequence[Sequence[int]]
"""The token ids that samples are to continue, one per sample and all of one length; empty: the start token alone."""


@dataclass(frozen=True)
class Sampling:
    """What to sample from and how: small, so that it travels to the actor that loads the model."""

    model: str
    revision: str | None
    precision: Literal["bf16", "fp16", "fp32"]
    device: str
    start_token: str
    start_id: int
    stop_ids: tuple[int, ...]
    max_tokens: int


def uniforms(seeds: Sequence[int], steps: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (sample, step): shape (len(seeds), steps); a row depends on its seed alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
    return np.array(rows, np.float64).reshape(len(seeds), steps)


def sampling(config: MixtureConfig, tokenizer: "PreTrainedTokenizerFast | None" = None) -> Sampling:
    """The sampling a configuration asks for; reads the model's tokenizer and configuration, not its weights.

    Raises ConfigError when there is no such model, the start token is not one token of its vocabulary, or max_tokens
    does not fit its context.
    """
    location, settings = config.model_location(config.model), config.detection
    tokenizer = tokenizer or load_tokenizer(location, config.model.revision)
    token, start_id = start_of(tokenizer, settings.start_token)
    described = model_config(location, config.model.revision)
    context = context_of(described)
    if context is not None and settings.max_tokens >= context:
        raise ConfigError(
            f"detection.max_tokens {settings.max_tokens} and the start token do not fit the model's context of "
            f"{context} tokens: set it to {context - 1} or less"
        )
    ends = _ends(described, location, config.model.revision)
    return Sampling(
        model=location,
        revision=config.model.revision,
        precision=settings.precision,
        device=settings.device,
        start_token=token,
        start_id=start_id,
        # The start token separates documents where it is generated: what follows would be a second text.
        stop_ids=tuple(sorted({*ends, tokenizer.eos_token_id, start_id} - {None})),
        max_tokens=settings.max_tokens,
    )


def start_of(tokenizer: "PreTrainedTokenizerFast", wanted: str | None) -> tuple[str, int]:
    """The start token and its id: the wanted one, else the tokenizer's bos_token, else its eos_token.

    Raises ConfigError, naming the special tokens there are, when it is not exactly one token of the vocabulary.
    """
    token = wanted if wanted is not None else tokenizer.bos_token or tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    if token is None:
        found = "the tokenizer has neither bos_token nor eos_token"
    elif token not in vocabulary:
        found = f"start token {token!r} is not one token of the model's vocabulary"
    else:
        return token, vocabulary[token]
    known = ", ".join(map(repr, sorted({*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder})))
    raise ConfigError(f"{found}: set detection.start_token to the token its documents begin with, one of {known}")


def model_config(location: str, revision: str | None) -> Any:
    """The configuration of a model folder or hub name. Raises ConfigError when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: no model at {location!r}: {str(error).splitlines()[0]}") from None


def context_of(config: Any) -> int | None:
    """The tokens that a model's context holds (None: unlimited)."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def _ends(config: Any, location: str, revision: str | None) -> set[int]:
    """The ids at which the model ends a text."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(location, revision=revision).eos_token_id
    except OSError:
        ends = None
    ends = config.eos_token_id if ends is None else ends
    return set(ends if isinstance(ends, list) else [ends])


def prompts(start_id: int, count: int, openings: Openings) -> list[list[int]]:
    """What each sample starts from: the start token, and the opening it is to continue, if there are any."""
    return [[start_id, *opening] for opening in openings or [()] * count]


def sample_of(ids: Sequence[int], sampling: Sampling, tokenizer: "PreTrainedTokenizerFast") -> Sample:
    """The sample that generated ids are: what stands before the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in sampling.stop_ids), None)
    kept = list(ids[:end])
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Sample(text, tuple(kept), "length" if end is None else "stop")


class TransformersGenerator:
    """A causal language model loaded with transformers, on one device."""

    def __init__(self, sampling: Sampling) -> None:
        """Raises ConfigError when the model's weights cannot be loaded."""
        import torch
        from transformers import GenerationConfig

        self._sampling = sampling
        self._tokenizer = load_tokenizer(sampling.model, sampling.revision)
        self._device = sampling.device
        if sampling.device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = self._load()
        self._settings = GenerationConfig(
            do_sample=False,
            max_length=1 + sampling.max_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=int(sampling.start_id == 0),  # any but the start token, which would look like padding
        )

    def _load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        wanted = self._sampling
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted.precision]
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                wanted.model, revision=wanted.revision, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: cannot load {wanted.model!r}: {str(error).splitlines()[0]}") from None
        # generate() mixes the model's own defaults (top_k, penalties, …) into what it is given, unless there are none.
        model.generation_config = GenerationConfig()
        return model.to(self._device).eval()

    def __call__(self, seeds: Sequence[int], openings: Openings = ()) -> list[Sample]:
        """One sample per seed, in order; the seeds are those of one whole block."""
        import torch

        start = torch.tensor(prompts(self._sampling.start_id, len(seeds), openings), device=self._device)
        drawn = torch.from_numpy(uniforms(seeds, self._sampling.max_tokens)).to(self._device)
        try:
            with torch.inference_mode():
                ids = self._model.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    generation_config=self._settings,
                    use_model_defaults=False,
                    logits_processor=[_draw(drawn)],
                )
        except torch.OutOfMemoryError:
            raise DetectionError(
                f"{len(seeds)} texts of {self._sampling.max_tokens} tokens together do not fit the GPU's memory: lower "
                "detection.block"
            ) from None
        return [sample_of(row, self._sampling, self._tokenizer) for row in ids[:, 1:].tolist()]


def _draw(uniform: "torch.Tensor") -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    """A logits processor that leaves each row only the token its number of this step draws from the softmax."""
    import torch

    def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        step = ids.shape[1] - 1
        shares = torch.softmax(logits.float(), dim=-1).double().cumsum(dim=-1)
        if not shares[:, -1].isfinite().all():
            raise DetectionError(
                "the model gives tokens no probabilities (not a number): its weights are damaged, or too large for "
                "this precision: set detection.precision to bf16 or fp32"
            )
        sought = uniform[:, step : step + 1] * shares[:, -1:]
        # The first token whose cumulative share exceeds the number: one of probability 0 is never drawn.
        token = torch.searchsorted(shares, sought, right=True).clamp_(max=logits.shape[1] - 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

    return process


class VllmGenerator:
    """A causal language model in vLLM, in this process: its interpreter is the one of vLLM's environment.

    Equal seeds give equal samples on one kind of device, others than transformers draws. On CPUs, vLLM takes 32 bits of
    a seed: of 200,000 samples, about 5 are drawn twice.
    """

    def __init__(self, sampling: Sampling, settings: Vllm) -> None:
        """Raises ConfigError when vLLM cannot load the model."""
        self._sampling = sampling
        self._tokenizer = load_tokenizer(sampling.model, sampling.revision)
        self._engine = engine.start(
            sampling.model, sampling.revision, sampling.precision, sampling.max_tokens + 1, settings
        )

    def __call__(self, seeds: Sequence[int], openings: Openings = ()) -> list[Sample]:
        """One sample per seed, in order; the seeds are those of one whole block."""
        from vllm import SamplingParams

        # Ids, not text: to a text vLLM would add the tokenizer's own start token.
        starts = prompts(self._sampling.start_id, len(seeds), openings)
        settings = [
            SamplingParams(
                seed=seed,
                temperature=1.0,
                top_p=1.0,
                max_tokens=1 + self._sampling.max_tokens - len(start),
                stop_token_ids=list(self._sampling.stop_ids),
                ignore_eos=True,  # stop_ids hold it, and every other end the model knows
                detokenize=False,
            )
            for seed, start in zip(seeds, starts, strict=True)
        ]
        outputs = self._engine.generate([{"prompt_token_ids": start} for start in starts], settings, use_tqdm=False)
        return [
            sample_of([*start[1:], *output.outputs[0].token_ids], self._sampling, self._tokenizer)
            for start, output in zip(starts, outputs, strict=True)
        ]
