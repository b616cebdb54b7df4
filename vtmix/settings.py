"""The settings of mixture.yaml as frozen models: what a run is made from.

Each model is one part of the file, and its descriptions are what editors show. Relative paths refer to the folder of
mixture.yaml.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    StringConstraints,
    model_validator,
)

DOMAIN_PATTERN = r"^[a-z][a-z0-9_-]{0,31}$"

DomainName = Annotated[str, StringConstraints(pattern=DOMAIN_PATTERN)]
Share = Annotated[float, Field(ge=0, le=1)]


class Model(BaseModel):
    """Base of every model here: immutable, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LanguageModel(Model):
    """A causal language model: a hub name or a local folder; given as a string, it is the name."""

    name: Annotated[str, Field(min_length=1, description="hub name, or folder relative to mixture.yaml")]
    revision: Annotated[str | None, Field(description="commit or tag on the hub")] = None


class Source(Model):
    """Records of one domain: a JSONL or Parquet file (or glob), or a Hugging Face dataset."""

    path: Annotated[str | None, Field(description="*.jsonl or *.parquet file; globs allowed")] = None
    dataset: Annotated[str | None, Field(description="Hugging Face dataset: hub name or folder")] = None
    config: Annotated[str | None, Field(description="the dataset's configuration")] = None
    split: Annotated[str, Field(description="the dataset's split")] = "train"
    prompt: Annotated[str, Field(description="field that holds the prompt")] = "prompt"
    response: Annotated[str, Field(description="field that holds the response")] = "response"
    messages: Annotated[str, Field(description="field that holds a chat: a list of {role, content}")] = "messages"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of 'path' (JSONL or Parquet) and 'dataset' (Hugging Face)")
        return self


def _as_model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


ModelField = Annotated[LanguageModel, BeforeValidator(_as_model, json_schema_input_type=str | LanguageModel)]
SourcesField = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
]


StoreField = Annotated[str | None, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+")]


class Domain(Model):
    """One domain's data. Without `eval`, a share of `train` is held out by hash."""

    train: Annotated[SourcesField, Field(min_length=1)]
    eval: SourcesField = ()


class Encoding(Model):
    """How a conversation becomes token ids and labels."""

    template: Annotated[
        Literal["auto", "chat", "plain"],
        Field(description="auto: the tokenizer's chat template when it has one, else the plain one"),
    ] = "auto"
    max_length: Annotated[int, Field(ge=8, le=1 << 24, description="tokens")] = 2048
    overlong: Annotated[
        Literal["truncate", "drop"],
        Field(description="truncate: cut the end; a sample left without a response token is dropped. Both are counted"),
    ] = "truncate"


class Pool(Model):
    """How a domain's records become the pool that every epoch draws from."""

    folder: Annotated[str | None, Field(description="a pool folder shared by several runs; default: <run>/pool")] = None
    store: Annotated[
        StoreField,
        Field(description="s3://bucket/pools, gs://…: pools are put there, and their samples read from there by range"),
    ] = None
    seed: Annotated[int, Field(ge=0, description="fixes pool order and the held-out split")] = 0
    eval_fraction: Annotated[float, Field(gt=0, lt=1, description="held out by hash, where `eval` is absent")] = 0.05
    max_bad_records: Annotated[int, Field(ge=0, description="more rejected records than this stop the build")] = 0
    leak: Annotated[
        Literal["stop", "drop"], Field(description="a training sample that also stands in an eval split")
    ] = "stop"
    texts: Annotated[int, Field(ge=0, description="texts kept per domain, which the classifier is fitted on")] = 2000


class Probe(Model):
    """The linear probe: static embeddings and a logistic regression fitted on the pools' texts."""

    kind: Literal["probe"] = "probe"
    folds: Annotated[int, Field(ge=2, description="every text is judged by a fit without its fold, to measure it")] = 5


class VllmEnvironment(Model):
    """An environment of its own, where vLLM runs: it needs another PyTorch than the trainer."""

    python: Annotated[str, Field(description="its interpreter, relative to mixture.yaml; `make vllm-env` builds it")]
    tensor_parallel: Annotated[int, Field(ge=1, description="GPUs that one model is spread over")] = 1
    arguments: Annotated[
        dict[str, Any],
        Field(
            description="more of vLLM's engine arguments, such as gpu_memory_utilization; what may change its answers, "
            "such as quantization, stays the same within a run"
        ),
    ] = {}


class Transformers(Model):
    """Generation with transformers: no further environment, on any device."""

    kind: Literal["transformers"] = "transformers"


class Vllm(VllmEnvironment):
    """Generation with vLLM."""

    kind: Literal["vllm"]


class Question(Model):
    """What a judge is asked. It answers with one of the markers, whose probabilities are read from its next token."""

    prompt: Annotated[str, Field(description="holds {text} and {options}; default: vtmix/question.py")] | None = None
    options: Annotated[
        dict[DomainName, str], Field(description="how a domain is put to the judge; default: its name")
    ] = {}
    markers: Annotated[
        tuple[str, ...] | None, Field(description="one per domain, with different first tokens; default: A, B, …")
    ] = None
    permutations: Annotated[
        int, Field(ge=1, description="orders of the options to average over, against position bias; k: all places")
    ] = 1
    heldout: Annotated[int, Field(ge=1, description="labelled texts per domain that measure the judge")] = 100


class Judge(Question, VllmEnvironment):
    """A language model in vLLM that is asked for the domain: one forward pass per text and permutation."""

    kind: Literal["judge"]
    model: Annotated[ModelField | None, Field(description="default: the model itself")] = None


ASKED = frozenset(
    {"model", "messages", "prompt", "logprobs", "top_logprobs", "temperature", "top_p", "max_tokens", "stream"}
)
"""Fields of a request to an endpoint that say what is asked, and how the answer is read."""


class Endpoint(Question):
    """A judge behind an OpenAI-compatible server. The key is read from the environment and written nowhere."""

    # An error that shows what it found may show a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    kind: Literal["endpoint"]
    url: Annotated[str, Field(pattern="^https?://", description="with its version: http://127.0.0.1:8000/v1")]
    model: Annotated[str, Field(min_length=1, description="as the server names it")]
    api: Annotated[
        Literal["chat", "completions"], Field(description="completions: for models without a chat template")
    ] = "chat"
    extra_body: Annotated[
        dict[str, JsonValue],
        Field(
            description="fields added to every request, for what a server calls otherwise: {chat_template_kwargs: "
            "{enable_thinking: false}} for a model that thinks"
        ),
    ] = {}
    key: Annotated[str, Field(description="the environment variable that holds the key")] = "OPENAI_API_KEY"
    concurrency: Annotated[int, Field(ge=1, description="requests under way at a time, per actor")] = 32
    timeout: Annotated[float, Field(gt=0, description="seconds per request")] = 60
    retries: Annotated[int, Field(ge=0, description="after 429, 5xx and timeouts, with growing pauses")] = 8

    # Before anything else is looked at: a complaint about another part of the URL would show it.
    @model_validator(mode="before")
    @classmethod
    def _url_holds_no_secret(cls, value: Any) -> Any:
        url = str(value.get("url")) if isinstance(value, dict) else ""
        if re.match("[^/]*/*[^/]*@", url) or "?" in url:
            raise ValueError(
                "url holds a user, a password or a query, which would be written into what a run commits: give the "
                "server's address alone, and its key in the environment variable that `key` names"
            )
        return value

    @model_validator(mode="after")
    def _question_stays_as_it_is(self) -> Self:
        taken = sorted(ASKED & self.extra_body.keys())
        if taken:
            raise ValueError(
                f"extra_body holds {', '.join(map(repr, taken))}, which vtmix sets itself: remove them (`model` and "
                "`api` are settings of their own)"
            )
        return self


class Resources(Model):
    """What each actor of a Ray stage reserves."""

    actors: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0, description="per actor; fractional, so that 2 cores never deadlock")] = 0.5
    gpus: Annotated[float, Field(ge=0, description="per actor")] = 0

    @property
    def all_cpus(self) -> float:
        """CPUs reserved by all actors of the stage."""
        return self.actors * self.cpus


PublishedName = Literal[
    "llama-2-7b", "llama-2-13b", "llama-3-8b", "qwen-1.5-7b", "qwen-2-7b", "qwen-2.5-7b", "qwen-2.5-14b"
]


class Detection(Model):
    """Algorithm 1: sample the base model from its start token and classify what it says."""

    published: Annotated[
        PublishedName | None,
        Field(description="take the paper's counts for this model instead of sampling; domains as in the paper"),
    ] = None
    iterations: Annotated[int, Field(ge=1)] = 5
    samples: Annotated[int, Field(ge=1, description="per iteration")] = 40_000
    stop_at_margin: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="stop once every domain's share is known to ± this (95 %), as classified and, with `correct`, "
            "as corrected; default: never",
        ),
    ] = None
    max_tokens: Annotated[int, Field(ge=1)] = 256
    block: Annotated[int, Field(ge=1, description="samples generated, classified and committed together")] = 256
    start_token: Annotated[str | None, Field(description="default: the tokenizer's bos_token, else its eos_token")] = (
        None
    )
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    device: Annotated[str, Field(description="auto, cpu, cuda")] = "auto"
    engine: Annotated[Transformers | Vllm, Field(discriminator="kind")] = Transformers()
    classifier: Annotated[Probe | Judge | Endpoint, Field(discriminator="kind")] = Probe()
    control: Annotated[
        int,
        Field(
            ge=0,
            description="samples per domain that continue openings of its texts, so that the classifier is measured on "
            "the model's own writing; 0: on the domains' texts alone",
        ),
    ] = 0
    opening: Annotated[
        int,
        Field(
            ge=1,
            description="tokens of each opening: more keep a model closer to the subject than it would keep itself, "
            "fewer say less about what it is",
        ),
    ] = 8
    correct: Annotated[
        bool, Field(description="take the shares corrected by the classifier's confusion matrix for the distribution")
    ] = False
    max_unclassified: Annotated[Share, Field(description="a larger share refuses the detection")] = 0.2
    generate: Resources = Resources(cpus=1)
    classify: Resources = Resources()

    @model_validator(mode="after")
    def _openings_leave_room(self) -> Self:
        if self.control and self.opening >= self.max_tokens:
            raise ValueError(
                f"openings of {self.opening} tokens leave nothing of max_tokens {self.max_tokens} to continue: lower "
                "opening, raise max_tokens, or set control to 0"
            )
        return self


LossUnit = Literal["nats_per_token", "nats_per_byte"]


class Reference(Model):
    """The mastery ceiling: a model fine-tuned on each domain alone; its lowest held-out loss counts."""

    losses: Annotated[
        dict[DomainName, Annotated[float, Field(ge=0)]] | None,
        Field(description="reference losses known beforehand, of every domain: then nothing is trained for them"),
    ] = None
    unit: Annotated[
        LossUnit, Field(description="of `losses`; per byte they may come from a model with another tokenizer")
    ] = "nats_per_token"
    model: Annotated[ModelField | None, Field(description="default: the model itself")] = None
    epochs: Annotated[int, Field(ge=1)] = 3
    samples: Annotated[int | None, Field(ge=1, description="per epoch and domain; default: the whole pool")] = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] = 2e-5
    device: Annotated[str, Field(description="auto, cpu, cuda")] = "auto"
    precision: Annotated[str, Field(description="auto (bf16 on cuda, else fp32), fp32, bf16")] = "auto"
    resources: Resources = Resources(cpus=1)


Algorithm = Literal[
    "uniform",
    "inverse",
    "constant",
    "versatune",
    "versatune-expand",
    "expand-unbounded",
    "expand-uniform",
    "single-domain",
    "natural",
    "temperature",
    "doremi",
    "odm",
    "authors-code",
    "schedule",
]
OwnRule = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
EXPANDING = ("versatune-expand", "expand-unbounded", "expand-uniform", "single-domain")


class WeightsSettings(Model):
    """Which rule moves the weights, and its settings (arXiv 2411.11266, Algorithms 2 and 3, and their rivals)."""

    algorithm: Annotated[
        Algorithm | OwnRule, Field(description="module:function names a rule of your own, which is imported")
    ] = "versatune"
    sigma: Annotated[float, Field(ge=0, description="step size of Algorithms 2 and 3; the paper uses 0.5")] = 0.5
    floor: Annotated[Share, Field(description="no domain's weight falls below this")] = 0.0
    update_before_first_epoch: Annotated[
        bool, Field(description="evaluate the base model and update once before epoch 1 (Algorithm 2 to the letter)")
    ] = False
    targets: Annotated[
        tuple[DomainName, ...], Field(description="the domains to expand: Algorithm 3's, and single-domain's")
    ] = ()
    delta: Annotated[Share, Field(description="what the targets gain per epoch, in absolute weight")] = 0.1
    epsilon: Annotated[
        float, Field(ge=0, description="the others' mean φ must stay below ε times the targets' γ for a gain")
    ] = 1.0
    temperature: Annotated[float, Field(gt=0, description="τ: natural^(1/τ)")] = 2.0
    eta: Annotated[float, Field(ge=0, description="step size of doremi")] = 1.0
    smoothing: Annotated[Share, Field(description="of doremi, towards uniform")] = 1e-3
    schedule: Annotated[
        tuple[dict[DomainName, Share], ...], Field(description="weights per epoch; the last ones hold for the rest")
    ] = ()


class Packing(Model):
    """How several samples share one sequence of fixed length, in which none sees another."""

    length: Annotated[int, Field(ge=8, le=1 << 24, description="tokens of a sequence; no sample may be longer")]
    multiple: Annotated[
        int,
        Field(ge=1, description="a shard's sequences are a multiple of this, by empty ones: the trainer's ranks"),
    ] = 1


Unit = Literal["samples", "tokens", "response_tokens"]


class Mixture(Model):
    """How an epoch is made up, and how its samples become shards."""

    unit: Annotated[
        Unit, Field(description="what the weights are shares of; samples_per_epoch samples make an epoch in any case")
    ] = "samples"
    shard_bytes: Annotated[
        int, Field(ge=1 << 10, le=(1 << 32) - 1, description="largest shard; offsets are uint32, so below 4 GiB")
    ] = 1 << 26
    compression: Annotated[
        str | None,
        Field(
            pattern=r"^zstd(:([1-9]|1[0-9]|2[0-2]))?$",
            description="of shards: zstd, or zstd:1 … zstd:22; readers expand them as they fetch them. null: none",
        ),
    ] = None
    packing: Annotated[
        Packing | None, Field(description="samples share sequences of fixed length; null: one sample a row")
    ] = None
    max_passes: Annotated[float | None, Field(gt=0, description="refuse an epoch that repeats a pool more often")] = (
        None
    )
    store: Annotated[
        StoreField, Field(description="s3://bucket/mixture, gs://…: epochs are written there, not into the run folder")
    ] = None


class Training(Model):
    """The Composer trainer."""

    batch_size: Annotated[int, Field(ge=1, description="samples (or packed sequences) per step, over all ranks")] = 128
    microbatch_size: Annotated[int | Literal["auto"] | None, Field(description="per device; auto: on GPUs only")] = None
    eval_batch_size: Annotated[int, Field(ge=1, description="per device")] = 16
    eval_samples: Annotated[int | None, Field(ge=1, description="per domain; default: the whole eval split")] = None
    eval_share: Annotated[
        float | None,
        Field(gt=0, le=1, description="instead: so many that evaluation takes no more of an epoch's training time"),
    ] = None
    lr: Annotated[float, Field(gt=0)] = 2e-5
    warmup: Annotated[Share, Field(description="share of all steps, linear; then cosine to 0 over all epochs")] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Annotated[float | None, Field(gt=0)] = 1.0
    device: Annotated[str, Field(description="auto, cpu, gpu")] = "auto"
    precision: Annotated[str, Field(description="auto (amp_bf16 on GPUs, fp32 on CPUs), or Composer's name")] = "auto"
    fsdp: Annotated[dict[str, Any] | None, Field(description="Composer's FSDP settings; null: none")] = None
    checkpoint_steps: Annotated[int | None, Field(ge=1, description="save within epochs too, every so many steps")] = (
        None
    )
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    processes: Annotated[int, Field(ge=1, description="ranks that `vtmix run` starts on this machine")] = 1

    @model_validator(mode="after")
    def _one_size_of_evaluation(self) -> Self:
        if self.eval_samples is not None and self.eval_share is not None:
            raise ValueError("give one of 'eval_samples' and 'eval_share'")
        return self


class MixtureConfig(Model):
    """mixture.yaml, validated. Domain order is the order in the file."""

    run: Annotated[str, Field(min_length=1, description="the run folder")] = "run"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    model: ModelField
    domains: Annotated[dict[DomainName, Domain], Field(min_length=1)]
    epochs: Annotated[int, Field(ge=1, le=9999)] = 4
    samples_per_epoch: Annotated[int, Field(ge=1)] = 60_000
    encoding: Encoding = Encoding()
    pool: Pool = Pool()
    detection: Detection = Detection()
    reference: Reference = Reference()
    weights: WeightsSettings = WeightsSettings()
    mixture: Mixture = Mixture()
    training: Training = Training()

    _root: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _floor_fits(self) -> Self:
        if self.weights.floor * len(self.domains) > 1:
            raise ValueError(
                f"weights.floor {self.weights.floor} times {len(self.domains)} domains exceeds 1: "
                f"lower it to {1 / len(self.domains):.4g} or less"
            )
        return self

    @model_validator(mode="after")
    def _samples_fit_into_sequences(self) -> Self:
        packing, longest = self.mixture.packing, self.encoding.max_length
        if packing and longest > packing.length:
            raise ValueError(
                f"encoding.max_length {longest} exceeds mixture.packing.length {packing.length}, and no sample is cut "
                "to fit into a sequence: lower the one, or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_some_of_the_domains(self) -> Self:
        settings = self.weights
        unknown = [name for name in settings.targets if name not in self.domains]
        if unknown:
            raise ValueError(f"weights.targets: {', '.join(unknown)} is none of the domains {', '.join(self.domains)}")
        if settings.algorithm in EXPANDING and not 0 < len(set(settings.targets)) < len(self.domains):
            raise ValueError(
                f"weights.algorithm '{settings.algorithm}' needs weights.targets: one domain or more, but not all"
            )
        return self

    @model_validator(mode="after")
    def _given_losses_are_of_every_domain(self) -> Self:
        given = self.reference.losses
        if given is not None and set(given) != set(self.domains):
            raise ValueError(
                f"reference.losses has {', '.join(given) or 'no domain'}, expected every domain and no other: "
                f"{', '.join(self.domains)}"
            )
        return self

    @model_validator(mode="after")
    def _schedule_gives_weights(self) -> Self:
        settings = self.weights
        if settings.algorithm == "schedule" and not settings.schedule:
            raise ValueError("weights.algorithm 'schedule' needs weights.schedule: a mapping of weights per epoch")
        for number, declared in enumerate(settings.schedule, start=1):
            unknown = [name for name in declared if name not in self.domains]
            total = math.fsum(declared.values())
            if unknown or abs(total - 1) > 1e-9:
                found = f"unknown domain {', '.join(unknown)}" if unknown else f"weights that sum to {total:.12g}"
                raise ValueError(f"weights.schedule: epoch {number} has {found}: expected the domains' shares, sum 1")
        return self

    @property
    def root(self) -> Path:
        """The absolute folder that relative paths refer to."""
        return self._root

    def resolve(self, path: str) -> Path:
        """The absolute form of a path given in mixture.yaml."""
        return Path(os.path.normpath(self._root / Path(path).expanduser()))

    def model_location(self, model: LanguageModel) -> str:
        """A local folder's absolute path if there is one of that name, else the hub name."""
        folder = self.resolve(model.name)
        return str(folder) if folder.is_dir() else model.name
