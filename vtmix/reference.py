"""The mastery ceiling: a reference model fine-tuned on each domain alone; its lowest held-out loss counts.

Every domain starts from a fresh copy of the reference model and sees its own pool in pool order, epoch after epoch,
wrapping around. The held-out samples are those the trainer evaluates on, so both losses are of the same text. Domains
are committed one by one (reference/domains/<domain>.json), and a domain under way is checkpointed at the ends of its
epochs (reference/checkpoints/<domain>); a rerun goes on from there. Losses that mixture.yaml gives as numbers are taken
as they are.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtmix import batches, checkpoints, cluster, commit, distribute, pool, pooling, progress
from vtmix.artifacts import (
    DomainLoss,
    Inputs,
    PoolManifest,
    Reference,
    ReferenceLoss,
    RunFolder,
    fingerprint,
    run_folder,
)
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.errors import ConfigError, ConflictError, LossError, MixtureError
from vtmix.settings import LanguageModel, MixtureConfig
from vtmix.settings import Reference as Settings
from vtmix.stores import Store

if TYPE_CHECKING:
    import torch

Backend = Literal["local", "ray"]
Advance = Callable[[int], None]

CHECKPOINT_SECONDS = 60
"""Epochs that take less are not checkpointed one by one."""

# Rows that go through the model together: few, so that rows alike in length share little padding and memory is bounded.
MICROBATCH = 4


@dataclass(frozen=True)
class Job:
    """Everything that fine-tuning on one domain takes: small, so that it travels to a worker."""

    domain: str
    folder: Path
    store: Store | None
    model: str
    revision: str | None
    settings: Settings
    samples: int
    eval_samples: int
    eval_batch_size: int
    seed: int
    checkpoints: Path
    inputs: str
    """Fingerprint of all that its loss is made from."""

    @property
    def work(self) -> int:
        """Samples that go through the model, held-out ones included."""
        return self.settings.epochs * self.samples + (self.settings.epochs + 1) * self.eval_samples


def build(config: MixtureConfig, *, backend: Backend = "local") -> Reference:
    """The reference loss of every domain, committed as reference/reference.json.

    Raises MissingError without pools, ConflictError when losses of other inputs stand in the run folder, LossError
    when a loss is not finite; domains committed before are kept.
    """
    run = run_folder(config)
    if config.reference.losses is not None:
        return _given(config, run)
    cluster.require_durable(run)
    committed = _committed(config, run)
    if committed is not None:
        return committed
    with commit.lock(run.reference.parent, "reference"):
        pools, tokenizer = _pools(config, run)
        manifests = _manifests(config, pools)
        losses = _measure(config, run.reference.parent, pools, tokenizer, backend)
        reference = Reference(inputs=_inputs(config, manifests, tokenizer), tokenizer=tokenizer, domains=losses)
        reference.publish(run.reference)
    return reference


def summary(reference: Reference) -> Iterator[str]:
    """Every domain's loss, and what they cost."""
    for domain in reference.domains:
        yield f"{domain}: {reference.text_of(domain)}"
    cost = sum(loss.trained_tokens for loss in reference.domains.values())
    if cost:
        yield f"cost: {cost:,} tokens trained on, over all epochs of {len(reference.domains)} domains"


def train_domain(job: Job, advance: Advance = lambda _: None) -> ReferenceLoss:
    """Fine-tunes a fresh copy of the reference model on one domain and returns its lowest held-out loss.

    `advance` is told of samples as they are done. Raises LossError, naming domain and epoch, when a held-out loss is
    not finite or there is nothing to take it over.
    """
    import torch

    torch.manual_seed(job.seed)
    trainee = Trainee(job, advance)
    if not trainee.losses:
        trainee.evaluate()
    while trainee.epoch < job.settings.epochs:
        trainee.train()
        trainee.evaluate()
        trainee.checkpoint()
    losses = trainee.losses
    best = min(range(len(losses)), key=lambda epoch: losses[epoch].per_token)
    curve = tuple(loss.per_token for loss in losses)
    return ReferenceLoss(**losses[best].model_dump(), epoch=best, curve=curve, trained_tokens=trainee.trained_tokens)


class Trainee:
    """One domain's reference model on its way: `epoch` epochs done, with the losses after each and before the first."""

    def __init__(self, job: Job, advance: Advance) -> None:
        """Goes on from the newest checkpoint where there is one.

        Raises ConflictError when that was made from other inputs.
        """
        import torch

        self.epoch = 0
        self.losses: list[DomainLoss] = []
        self.trained_tokens = 0

        self._job = job
        self._advance = advance
        self._device = _device(job.settings.device)
        self._tokenizer = load_tokenizer(job.model, job.revision)
        self._pad = self._tokenizer.pad_token_id or 0
        self._model: Any = batches.load_model(job.model, job.revision).to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=job.settings.lr, weight_decay=0.0, fused=self._device.type in ("cpu", "cuda")
        )
        self._pool = pool.open_pool(job.folder, job.store)
        self._restore()
        self._kept = time.monotonic()

    def train(self) -> None:
        """Takes one more epoch's steps: the samples after those of the epoch before."""
        import torch

        torch.manual_seed((self._job.seed + self.epoch) % 2**63)  # so that no random state has to be kept
        self._model.train()
        count = self._job.samples
        samples = self._pool.samples(self.epoch * count, count)
        while rows := list(islice(samples, self._job.settings.batch_size)):
            self._step(batches.collate(rows, self._pad))
            self.trained_tokens += sum(len(row["input_ids"]) for row in rows)
            self._advance(len(rows))
        self.epoch += 1

    def checkpoint(self) -> None:
        """Keeps the state, unless what was done since the last one is done again as soon as it would be saved."""
        import torch

        if time.monotonic() - self._kept < CHECKPOINT_SECONDS:
            return
        path = checkpoints.staged(self._job.checkpoints, self.epoch)
        commit.make_folder(path.parent)
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "losses": [loss.model_dump() for loss in self.losses],
            "trained_tokens": self.trained_tokens,
        }
        torch.save(state, path)
        checkpoints.publish(path, step=self.epoch, epoch=self.epoch, mixture=self._job.inputs, keep=1)
        self._kept = time.monotonic()

    def _restore(self) -> None:
        import torch

        found = checkpoints.newest(self._job.checkpoints, lambda text: print(text, file=sys.stderr))
        if found is None:
            return
        path, checkpoint = found
        if checkpoint.mixture != self._job.inputs:
            raise ConflictError(
                f"{path.parent} was trained with other settings, or on another pool, than the reference model of "
                f"'{self._job.domain}' now is: restore them, remove that folder, or start another run folder"
            )
        state = torch.load(path, map_location=self._device, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = [DomainLoss(**loss) for loss in state["losses"]]
        self.trained_tokens = state["trained_tokens"]
        self.epoch = checkpoint.epoch
        done = self.epoch * self._job.samples + len(self.losses) * self._job.eval_samples
        self._advance(done)

    def evaluate(self) -> None:
        """Takes the held-out loss now."""
        import torch

        self._model.eval()
        held_out = batches.held_out(self._job.folder / "eval", self._job.eval_samples)
        sums = batches.LossSums()
        with torch.no_grad():
            for rows in _chunks(held_out, self._job.eval_batch_size):
                batch = batches.collate(rows, self._pad)
                sums += batches.LossSums.of(batch, self._nats(batch).cpu(), self._tokenizer)
                self._advance(len(rows))
        self.losses.append(self._checked(sums.loss()))

    def _step(self, batch: batches.Batch) -> None:
        tokens = batches.response_tokens(batch)
        for microbatch in batches.split(batch, MICROBATCH):
            (self._nats(microbatch).sum() / tokens).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _nats(self, batch: batches.Batch) -> "torch.Tensor":
        import torch

        moved = {name: value.to(self._device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        precision = self._job.settings.precision
        half = precision == "bf16" or (precision == "auto" and self._device.type == "cuda")
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            return batches.response_nats(self._model, moved)

    def _checked(self, loss: DomainLoss) -> DomainLoss:
        where = f"of the reference model of '{self._job.domain}' after epoch {self.epoch}"
        if not loss.tokens:
            raise LossError(
                f"the held-out loss {where} was taken over no response token: "
                "give the domain `eval` sources, or raise pool.eval_fraction"
            )
        if not math.isfinite(loss.nats):
            raise LossError(f"the held-out loss {where} is {loss.nats}: lower reference.lr")
        return loss


def _device(wanted: str) -> "torch.device":
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"reference.device is {wanted!r} but torch sees no GPU: use 'auto' or 'cpu'")
    return torch.device(wanted)


def _chunks(items: Any, size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield [items[number] for number in range(start, min(start + size, len(items)))]


def _measure(
    config: MixtureConfig, folder: Path, pools: Path, tokenizer: str, backend: Backend
) -> dict[str, ReferenceLoss]:
    """The committed loss of every domain; those that are missing are measured."""
    manifests = _manifests(config, pools)
    inputs = {name: _inputs(config, {name: manifest}, tokenizer) for name, manifest in manifests.items()}
    paths = {name: folder / "domains" / f"{name}.json" for name in manifests}
    committed = {name: Reference.committed(paths[name], inputs[name]) for name in manifests}
    losses = {name: found.domains[name] for name, found in committed.items() if found is not None}
    jobs = [_job(config, pools, manifests[name], fingerprint(inputs[name])) for name in manifests if name not in losses]
    for job, loss in _trained(jobs, backend):
        found = Reference(inputs=inputs[job.domain], tokenizer=tokenizer, domains={job.domain: loss})
        found.publish(paths[job.domain])
        losses[job.domain] = loss
        if job.checkpoints.exists():
            commit.remove_folder(job.checkpoints)
    if (folder / "checkpoints").exists():
        commit.remove_folder(folder / "checkpoints")
    return {name: losses[name] for name in config.domains}


def _job(config: MixtureConfig, pools: Path, manifest: PoolManifest, inputs: str) -> Job:
    domain, run = manifest.domain, run_folder(config)
    if not manifest.samples:
        raise MixtureError(f"domain '{domain}' has an empty pool, so no reference model can be trained: add samples")
    model = config.reference.model or config.model
    return Job(
        domain=domain,
        folder=pools / domain,
        store=pool.pool_store(config, domain) if pools == run.pools else None,
        model=config.model_location(model),
        revision=model.revision,
        settings=config.reference,
        samples=config.reference.samples or manifest.samples,
        eval_samples=min(_eval_sizes(config, run)[domain], manifest.eval.samples),
        eval_batch_size=config.training.eval_batch_size,
        seed=config.seed % 2**63,
        checkpoints=run.reference.parent / "checkpoints" / domain,
        inputs=inputs,
    )


def _trained(jobs: Sequence[Job], backend: Backend) -> Iterator[tuple[Job, ReferenceLoss]]:
    """Yields every job with its loss, as they are done."""
    with progress.bar("reference", sum(job.work for job in jobs), "samples") as advance:
        if backend == "local" or not jobs:
            for job in jobs:
                yield job, train_domain(job, advance)
        else:
            for job, loss in _on_ray(jobs):
                advance(job.work)
                yield job, loss


def _on_ray(jobs: Sequence[Job]) -> Iterator[tuple[Job, ReferenceLoss]]:
    """Runs each domain as a Ray task with the resources of reference.resources."""
    import ray

    settings = jobs[0].settings
    with cluster.connect(settings.resources.cpus):
        gpus = _gpus(settings, ray.cluster_resources().get("GPU", 0))
        cluster.require_resources(settings.resources.cpus, gpus)
        task: Any = ray.remote(num_cpus=settings.resources.cpus, num_gpus=gpus)(train_domain)
        pending = {task.remote(job): job for job in jobs}
        while pending:
            done, _ = ray.wait(list(pending))
            yield pending.pop(done[0]), distribute.ray_result(done[0])


def _gpus(settings: Settings, there: float) -> float:
    """GPUs per task: as set, else one where the cluster has one and the device allows."""
    if settings.resources.gpus or settings.device == "cpu":
        return settings.resources.gpus
    return 1 if there or settings.device.startswith("cuda") else 0


def _pools(config: MixtureConfig, run: RunFolder) -> tuple[Path, str]:
    """The folder of pools encoded with the reference model's tokenizer, and that tokenizer's digest.

    They are the run's own pools unless the reference model has another tokenizer: then they are built beside it.
    """
    own = _tokenizer_of(config, run.pools)
    model = config.reference.model
    if model is None:
        return run.pools, own
    digest = _digest(config, model)
    if digest == own:
        return run.pools, own
    folder = run.reference.parent / "pool"
    pooling.build(config, folder=folder, model=model)
    return folder, digest


def _given(config: MixtureConfig, run: RunFolder) -> Reference:
    """The losses that mixture.yaml gives, committed like measured ones.

    Raises ConflictError when others stand in the run folder.
    """
    unit, losses = config.reference.unit, config.reference.losses or {}
    inputs: Inputs = {"losses": losses, "unit": unit}
    committed = Reference.committed(run.reference, inputs)
    if committed is not None:
        return committed
    tokens, size = (1, 0) if unit == "nats_per_token" else (0, 1)
    given = {
        name: ReferenceLoss(nats=losses[name], tokens=tokens, bytes=size, samples=0, epoch=0) for name in config.domains
    }
    reference = Reference(inputs=inputs, tokenizer=_tokenizer_of(config, run.pools), unit=unit, domains=given)
    reference.publish(run.reference)
    return reference


def _eval_sizes(config: MixtureConfig, run: RunFolder) -> dict[str, int]:
    """Of the run's own pools, so that every reference model is evaluated on the samples the trainer takes."""
    return pool.eval_sizes(config, _manifests(config, run.pools))


def _digest(config: MixtureConfig, model: LanguageModel) -> str:
    return tokenizer_digest(load_tokenizer(config.model_location(model), model.revision))


def _manifests(config: MixtureConfig, pools: Path) -> dict[str, PoolManifest]:
    remedy = "run `vtmix pool` first"
    return {name: PoolManifest.read(pools / name / "pool.json", remedy) for name in config.domains}


def _tokenizer_of(config: MixtureConfig, pools: Path) -> str:
    """The digest of the tokenizer that pools were encoded with."""
    manifests = _manifests(config, pools).values()
    return " ".join(sorted({str((manifest.inputs or {}).get("tokenizer")) for manifest in manifests}))


def _committed(config: MixtureConfig, run: RunFolder) -> Reference | None:
    """The committed reference losses, if there are any; loads no tokenizer, whose digest enters by way of the pools."""
    if not run.reference.exists():
        return None
    found = Reference.read(run.reference, "")
    if found.inputs is None:
        return found
    pools = run.pools if found.tokenizer == _tokenizer_of(config, run.pools) else run.reference.parent / "pool"
    return Reference.committed(run.reference, _inputs(config, _manifests(config, pools), found.tokenizer))


def _inputs(config: MixtureConfig, manifests: dict[str, PoolManifest], tokenizer: str) -> Inputs:
    """What reference losses are made from."""
    settings = {"epochs", "samples", "batch_size", "lr", "precision"}
    return {
        "model": (config.reference.model or config.model).model_dump(mode="json"),
        "tokenizer": tokenizer,
        "settings": config.reference.model_dump(mode="json", include=settings),
        "seed": config.seed,
        "eval_samples": {
            name: count for name, count in _eval_sizes(config, run_folder(config)).items() if name in manifests
        },
        "pools": {name: manifest.fingerprint() for name, manifest in manifests.items()},
    }
