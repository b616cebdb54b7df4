"""The mastery ceiling: a reference model fine-tuned on each domain alone; its lowest held-out loss counts.

Every domain starts from a fresh copy of the reference model and sees its own pool in pool order, epoch after epoch,
wrapping around. The held-out samples are those the trainer evaluates on, so both losses are of the same text. Domains
are committed one by one (reference/domains/<domain>.json), and a domain under way is checkpointed at the ends of its
epochs (reference/checkpoints/<domain>); a rerun goes on from there. Losses that mixture.yaml gives as numbers are taken
as they are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from vtmix import cluster, commit, distribute, pool, pooling, progress
from vtmix.artifacts import Inputs, PoolManifest, Reference, ReferenceLoss, RunFolder, fingerprint, run_folder
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.errors import MixtureError
from vtmix.settings import LanguageModel, MixtureConfig
from vtmix.trainee import Job, train_domain

Backend = Literal["local", "ray"]


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
        inputs = _inputs(config, manifests, _eval_sizes(config, run), tokenizer)
        reference = Reference(inputs=inputs, tokenizer=tokenizer, domains=losses)
        reference.publish(run.reference)
    return reference


def summary(reference: Reference) -> Iterator[str]:
    """Every domain's loss, and what they cost."""
    unit = reference.unit or "nats_per_token"
    for domain, loss in reference.domains.items():
        origin = "as mixture.yaml gives it" if reference.unit else f"lowest after epoch {loss.epoch}"
        yield f"{domain}: {loss.per(unit):.4f} {unit.replace('_', ' ')}, {origin}"
    cost = sum(loss.trained_tokens for loss in reference.domains.values())
    if cost:
        yield f"cost: {cost:,} tokens trained on, over all epochs of {len(reference.domains)} domains"


def _measure(
    config: MixtureConfig, folder: Path, pools: Path, tokenizer: str, backend: Backend
) -> dict[str, ReferenceLoss]:
    """The committed loss of every domain; those that are missing are measured."""
    manifests, sizes = _manifests(config, pools), _eval_sizes(config, run_folder(config))
    inputs = {name: _inputs(config, {name: manifest}, sizes, tokenizer) for name, manifest in manifests.items()}
    paths = {name: folder / "domains" / f"{name}.json" for name in manifests}
    committed = {name: Reference.committed(paths[name], inputs[name]) for name in manifests}
    losses = {name: found.domains[name] for name, found in committed.items() if found is not None}
    jobs = [
        _job(config, pools, manifest, sizes[name], fingerprint(inputs[name]))
        for name, manifest in manifests.items()
        if name not in losses
    ]
    for job, loss in _trained(jobs, backend):
        found = Reference(inputs=inputs[job.domain], tokenizer=tokenizer, domains={job.domain: loss})
        found.publish(paths[job.domain])
        losses[job.domain] = loss
        if job.checkpoints.exists():
            commit.remove_folder(job.checkpoints)
    if (folder / "checkpoints").exists():
        commit.remove_folder(folder / "checkpoints")
    return {name: losses[name] for name in config.domains}


def _job(config: MixtureConfig, pools: Path, manifest: PoolManifest, eval_samples: int, inputs: str) -> Job:
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
        eval_samples=min(eval_samples, manifest.eval.samples),
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
        gpus = cluster.gpus_for(settings.resources, settings.device)
        cluster.require_resources([cluster.Reserved(settings.resources.cpus, gpus)])
        task: Any = ray.remote(num_cpus=settings.resources.cpus, num_gpus=gpus)(train_domain)
        pending = {task.remote(job): job for job in jobs}
        while pending:
            done, _ = ray.wait(list(pending))
            yield pending.pop(done[0]), distribute.ray_result(done[0])


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
    inputs = _inputs(config, _manifests(config, pools), _eval_sizes(config, run), found.tokenizer)
    return Reference.committed(run.reference, inputs)


def _inputs(
    config: MixtureConfig, manifests: dict[str, PoolManifest], eval_samples: dict[str, int], tokenizer: str
) -> Inputs:
    """What the reference losses of these domains are made from."""
    settings = {"epochs", "samples", "batch_size", "lr", "precision"}
    return {
        "model": (config.reference.model or config.model).model_dump(mode="json"),
        "tokenizer": tokenizer,
        "settings": config.reference.model_dump(mode="json", include=settings),
        "seed": config.seed,
        "eval_samples": {name: eval_samples[name] for name in manifests},
        "pools": {name: manifest.fingerprint() for name, manifest in manifests.items()},
    }
