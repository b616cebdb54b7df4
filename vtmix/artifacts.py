"""The artefacts of a run: small JSON files that a person can read, and where they stand in the run folder.

Every artefact carries `inputs`: what it was made from. A stage whose artefact exists with equal inputs has nothing to
do; with other inputs it refuses, naming what differs. An artefact without `inputs` was written by hand and is taken
as it is. Artefacts hold no timestamps, host names or absolute paths, so equal runs are equal files.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from vtmix import commit
from vtmix.config import flatten
from vtmix.errors import ConflictError, DamageError, MissingError, listing
from vtmix.settings import DomainName, LossUnit, MixtureConfig, Model, Unit

Inputs = dict[str, Any]
MANIFEST = "manifest.json"
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Artefact(Model):
    """Base of every artefact: read, compared and written in one way."""

    inputs: Annotated[Inputs | None, Field(description="what this was made from; null: written by hand")] = None

    def text(self) -> bytes:
        """The canonical file content: indented JSON, UTF-8, one trailing newline."""
        content = self.model_dump(mode="json")
        return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def fingerprint(self) -> str:
        """SHA-256 of the canonical content."""
        return fingerprint(self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """The artefact at `path`.

        Raises MissingError (which ends with `remedy`) when there is none, DamageError when it does not validate.
        """
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(f"{_what(path)} not found ({path}): {remedy}") from None
        return cls.decode(raw, str(path))

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Self:
        """The artefact that a file's content describes.

        Raises DamageError, naming `where` it stood, when it does not validate.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            lines = (
                f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']} (found {_shorten(item['input'])})"
                for item in error.errors()
            )
            raise DamageError(f"{where} is not a valid {cls.__name__.lower()}:\n  {listing(lines)}") from None

    def publish(self, path: Path) -> bool:
        """Commits the artefact; False when it was committed before."""
        return commit.publish_file(path, self.text())

    @classmethod
    def committed(cls, path: Path, inputs: Inputs) -> Self | None:
        """The artefact at `path` if it was made from `inputs` (or by hand), None if there is none.

        Raises ConflictError naming every input that differs.
        """
        if not path.exists():
            return None
        return cls.read(path, "").require(inputs, str(path))

    def require(self, inputs: Inputs, where: str) -> Self:
        """This artefact, if it was made from `inputs` or by hand.

        Raises ConflictError naming every input that differs.
        """
        if self.inputs is None:
            return self
        changed = compare(self.inputs, inputs)
        if changed:
            raise ConflictError(
                f"{where} was made from other inputs, and committed files never change:\n  {listing(changed)}\n"
                f"restore what changed, or start another run folder"
            )
        return self


def fingerprint(content: Any) -> str:
    """SHA-256 of content in canonical JSON. Anything JSON cannot hold is refused rather than guessed at."""
    data = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(data.encode()).hexdigest()


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for every dotted key whose values differ."""
    old, new = flatten(dict(before)), flatten(_plain(after))
    return [
        f"{key} was {_shorten(old.get(key))}, is now {_shorten(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _what(path: Path) -> str:
    """An artefact's path in words: weights/epoch-0002.json is `weights for epoch 2`."""
    stem = path.parent.name if path.name in ("manifest.json", "pool.json") else path.stem
    kind = path.parent.parent.name if path.name == "manifest.json" else path.parent.name
    if stem.startswith("epoch-"):
        return f"{kind} for epoch {int(stem.removeprefix('epoch-'))}"
    return f"pool of '{stem}'" if path.name == "pool.json" else stem


class PoolPart(Model):
    """One Arrow file of a pool."""

    name: str
    samples: Count
    tokens: Annotated[Count, Field(description="of its samples, prompts included")]
    response_tokens: Annotated[Count, Field(description="of its samples: those a loss is taken over")]
    sample_bytes: Annotated[Count, Field(description="its encoded samples, without Arrow's framing")]
    bytes: Annotated[Count, Field(description="the file")]
    sha256: Annotated[str, Field(description="of the file")]


class EvalSplit(Model):
    """A domain's held-out samples."""

    samples: Count
    tokens: Count
    response_tokens: Count
    digest: Annotated[str, Field(description="SHA-256 of the sample ids in order")]


class PoolManifest(Artefact):
    """What a pool says of itself (pool/<domain>/pool.json)."""

    domain: DomainName
    samples: Count
    tokens: Count
    response_tokens: Count
    bytes: Annotated[Count, Field(description="encoded samples, without Arrow's framing")]
    max_sample_bytes: Count
    records: Annotated[Count, Field(description="records read, over all sources")]
    rejected: Annotated[Count, Field(description="records that could not be used, within the tolerance set")]
    duplicates: Annotated[Count, Field(description="exact repetitions dropped")]
    truncated: Annotated[Count, Field(description="samples cut at max_length")]
    overlong_dropped: Annotated[Count, Field(description="samples dropped by the overlong rule")]
    leaks_dropped: Annotated[Count, Field(description="training samples dropped since an eval split holds them")]
    eval: EvalSplit
    parts: tuple[PoolPart, ...]


class DomainShare(Model):
    """One domain's share of the detected knowledge."""

    mean: Probability
    standard_error: Annotated[float, Field(ge=0, description="over samples")]
    spread: Annotated[float, Field(ge=0, description="standard deviation of the iterations' means")]
    low: Annotated[Probability, Field(description="95 % interval, lower end")]
    high: Annotated[Probability, Field(description="95 % interval, upper end")]


class ClassifierReport(Model):
    """How well the classifier does on labelled text it was not fitted on."""

    kind: str
    heldout_texts: Count
    accuracy: Probability
    macro_f1: Probability
    calibration_error: Annotated[float, Field(ge=0, description="expected calibration error, 10 equal-width bins")]
    confusion: Annotated[
        dict[str, dict[str, float]], Field(description="true domain → mean predicted probabilities, on held-out text")
    ]


class DetectionReport(Artefact):
    """The knowledge distribution with error bars (detection/detection.json)."""

    distribution: Annotated[dict[DomainName, Probability], Field(description="sums to 1 over the domains")]
    knowledge: Annotated[
        str | None, Field(description="how it is known: detected, detected and corrected, published for …")
    ] = None
    shares: Annotated[dict[DomainName, DomainShare], Field(description="as classified, before renormalising")] = {}
    corrected: Annotated[
        dict[DomainName, DomainShare], Field(description="corrected by the classifier's confusion matrix; sums to 1")
    ] = {}
    unclassified: Annotated[Probability, Field(description="mass outside the domains, before renormalising")] = 0.0
    samples: Annotated[Count, Field(description="samples spent: fewer than were asked for where it stopped early")] = 0
    tokens: Annotated[Count, Field(description="generated tokens")] = 0
    paper_tokens: Annotated[
        Count, Field(description="what the paper's 200,000 samples would have taken at this mean length")
    ] = 0
    start_token: str | None = None
    classifier: ClassifierReport | None = None
    control: Annotated[
        ClassifierReport | None, Field(description="the classifier on the model's own writing; null: not measured")
    ] = None

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        _check_simplex(self.distribution, "distribution")
        return self


class DomainLoss(Model):
    """Summed loss over response tokens of a domain's eval samples."""

    # Not finite is let in so that the update can refuse it by name.
    nats: Annotated[float, Field(allow_inf_nan=True)]
    tokens: Count
    bytes: Count
    samples: Count
    standard_error: Annotated[
        float | None, Field(allow_inf_nan=True, description="of nats per token; null below two samples")
    ] = None

    @property
    def per_token(self) -> float:
        """Nats per response token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def per_byte(self) -> float:
        """Nats per response byte."""
        return self.nats / self.bytes if self.bytes else math.nan

    def per(self, unit: LossUnit) -> float:
        """The loss in a unit."""
        return self.per_byte if unit == "nats_per_byte" else self.per_token


class Losses(Artefact):
    """Eval losses per domain after an epoch; epoch 0 is the base model (losses/epoch-000N.json)."""

    epoch: Count
    tokenizer: Annotated[str, Field(description="digest: losses per token of two tokenizers cannot be compared")]
    mixture: Annotated[str | None, Field(description="digest of the mixture trained on; null for the base model")]
    domains: dict[DomainName, DomainLoss]


class ReferenceLoss(DomainLoss):
    """The lowest held-out loss of a domain's reference model, and the curve it was taken from."""

    epoch: Count
    curve: Annotated[tuple[float, ...], Field(description="nats per token, before training and after each epoch")] = ()
    trained_tokens: Annotated[Count, Field(description="what it cost: tokens trained on, over all epochs")] = 0


class Reference(Artefact):
    """The mastery ceiling per domain (reference/reference.json)."""

    tokenizer: str
    unit: Annotated[
        LossUnit | None, Field(description="of losses that mixture.yaml gave as numbers; null: measured")
    ] = None
    domains: dict[DomainName, ReferenceLoss]


class WeightTerms(Model):
    """The terms that led to one domain's weight (Eqs. 3 and 4, Algorithm 2)."""

    weight: Probability
    previous: Probability | None = None
    loss: float | None = None
    reference_loss: float | None = None
    potential: Annotated[float | None, Field(description="learnable potential γ, clipped at 0")] = None
    potential_raw: Annotated[float | None, Field(description="γ before clipping")] = None
    previous_loss: float | None = None
    forgetting: Annotated[float | None, Field(description="forgetting degree φ, clipped at 0")] = None
    forgetting_raw: Annotated[float | None, Field(description="φ before clipping")] = None
    factor: Annotated[float | None, Field(description="1 + σγ, what the previous weight was multiplied by")] = None


class ExpansionCondition(Model):
    """Line 8 of Algorithm 3 with both its sides, and what followed from it."""

    targets: tuple[DomainName, ...]
    forgetting: Annotated[float, Field(description="mean forgetting degree φ of the other domains")]
    bound: Annotated[float, Field(description="ε times the mean learnable potential γ of the targets")]
    holds: Annotated[bool, Field(description="forgetting < bound")]
    bounded: Annotated[bool, Field(description="false: the algorithm goes on whether it holds or not")]
    gain: Annotated[float, Field(description="what the targets gained: δ, or less where a cap acted; 0: nothing")]


class Weights(Artefact):
    """Target shares for one epoch, and the arithmetic that led to them (weights/epoch-000N.json)."""

    epoch: Annotated[int, Field(ge=1)]
    algorithm: str = "by hand"
    unit: Annotated[LossUnit | None, Field(description="of the losses in `terms`")] = None
    knowledge: Annotated[str | None, Field(description="how the knowledge distribution behind them is known")] = None
    weights: Annotated[dict[DomainName, Probability], Field(description="sums to 1")]
    terms: dict[DomainName, WeightTerms] = {}
    condition: Annotated[ExpansionCondition | None, Field(description="of an algorithm with target domains")] = None
    lifted: Annotated[tuple[DomainName, ...], Field(description="domains that the floor raised")] = ()
    warnings: Annotated[tuple[str, ...], Field(description="signal health, in words")] = ()

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        _check_simplex(self.weights, "weights")
        return self


class DomainPlan(Model):
    """What one epoch takes from one domain's pool."""

    weight: Probability
    count: Count
    position: Annotated[Count, Field(description="where in the endless repetition of the pool the epoch begins")]
    pool_samples: Count
    pool: Annotated[str, Field(description="fingerprint of the pool")]
    passes: Annotated[float, Field(ge=0, description="count / pool_samples")]
    unique: Annotated[Count, Field(description="different samples among the count")]
    tokens: Annotated[Count | None, Field(description="of these samples; null: not counted")] = None
    response_tokens: Annotated[Count | None, Field(description="of these samples; null: not counted")] = None
    bytes: Annotated[Count | None, Field(description="of these samples, encoded; null: not counted")] = None


class Plan(Artefact):
    """Counts and positions per domain for one epoch (plan/epoch-000N.json). Its size does not grow with the epoch."""

    epoch: Annotated[int, Field(ge=1)]
    knowledge: Annotated[str | None, Field(description="how the knowledge distribution behind it is known")] = None
    unit: Annotated[Unit, Field(description="what the weights are shares of")] = "samples"
    samples: Annotated[int, Field(ge=1)]
    shards: Annotated[int, Field(ge=1)]
    seed: Count
    domains: dict[DomainName, DomainPlan]


class MixtureFile(Model):
    """One file of a mixture, as it is stored."""

    name: str
    bytes: Count
    sha256: str
    raw_bytes: Annotated[Count | None, Field(description="of a compressed shard, before compression")] = None
    sequences: Annotated[Count | None, Field(description="of a packed shard")] = None


class Packed(Model):
    """The sequences that a mixture's samples share."""

    sequences: Count
    utilisation: Annotated[float, Field(ge=0, description="tokens / (sequences × their length)")]


class DomainCount(Model):
    """One domain's realised part of a mixture."""

    weight: Probability
    samples: Count
    proportion: Probability
    tokens: Count
    response_tokens: Count


class Manifest(Artefact):
    """What a mixture says of itself (mixture/epoch-000N/manifest.json); the mixture exists when this does."""

    epoch: Annotated[int, Field(ge=1)]
    fingerprint_of_inputs: str
    knowledge: Annotated[str | None, Field(description="how the knowledge distribution behind it is known")] = None
    samples: Count
    tokens: Count
    bytes: Count
    packing: Annotated[Packed | None, Field(description="null: every sample stands by itself")] = None
    domains: dict[DomainName, DomainCount]
    files: tuple[MixtureFile, ...]

    def digest(self) -> str:
        """SHA-256 of the manifest's bytes, which stand for every byte of the mixture."""
        return hashlib.sha256(self.text()).hexdigest()


def _check_simplex(shares: Mapping[str, float], what: str) -> None:
    total = math.fsum(shares.values())
    if not shares or abs(total - 1) > 1e-9:
        raise ValueError(f"{what} sum to {total:.12g}, expected 1 (within 1e-9)")


class RunFolder:
    """Where everything of one run stands; names only, nothing is created."""

    def __init__(self, path: Path, pool: Path | None = None) -> None:
        self.path = path
        self.pools = pool or path / "pool"

    @property
    def config(self) -> Path:
        return self.path / "mixture.yaml"

    def pool(self, domain: str) -> Path:
        return self.pools / domain

    @property
    def detection(self) -> Path:
        return self.path / "detection" / "detection.json"

    @property
    def reference(self) -> Path:
        return self.path / "reference" / "reference.json"

    def losses(self, epoch: int) -> Path:
        return self.path / "losses" / f"epoch-{epoch:04d}.json"

    def weights(self, epoch: int) -> Path:
        return self.path / "weights" / f"epoch-{epoch:04d}.json"

    def plan(self, epoch: int) -> Path:
        return self.path / "plan" / f"epoch-{epoch:04d}.json"

    def mixture(self, epoch: int) -> Path:
        return self.path / "mixture" / f"epoch-{epoch:04d}"

    def manifest(self, epoch: int) -> Path:
        """What a mixture says of itself, kept beside its place when the mixture is removed."""
        inside, kept = self.mixture(epoch) / MANIFEST, self.kept_manifest(epoch)
        return kept if kept.exists() and not inside.exists() else inside

    def kept_manifest(self, epoch: int) -> Path:
        return self.path / "mixture" / f"epoch-{epoch:04d}.json"

    def cache(self, digest: str) -> Path:
        """Where the mixture of a manifest's digest is fetched to from a store: never taken for that of another one."""
        return self.path / "cache" / digest[:16]

    def expanded(self, digest: str) -> Path:
        """Where a reader expands the compressed shards of a manifest's digest to."""
        return self.path / "cache" / f"{digest[:16]}-expanded"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def run_folder(config: MixtureConfig) -> RunFolder:
    """The run folder a configuration names, with absolute paths."""
    pool = config.resolve(config.pool.folder) if config.pool.folder else None
    return RunFolder(config.resolve(config.run), pool)
