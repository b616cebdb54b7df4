"""The file protocol of the closed loop, for any trainer: begin, train, advance, train, …

    mixture = loop.begin(config, base_losses)
    while mixture:
        …train on mixture.folder, evaluate every domain…
        mixture = loop.advance(config, mixture.epoch, losses)

Both functions commit files and are idempotent: a trainer that was restarted asks again and gets the same answer.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vtmix import commit
from vtmix import config as configuration
from vtmix.algorithms import Situation, Trained, named
from vtmix.artifacts import (
    DetectionReport,
    DomainLoss,
    Inputs,
    Losses,
    Manifest,
    PoolManifest,
    Reference,
    RunFolder,
    Weights,
    run_folder,
)
from vtmix.compile import compile_epoch, open_pools, store_of
from vtmix.errors import ConflictError, MissingError, listing
from vtmix.pool import POOL, eval_sizes
from vtmix.settings import LossUnit, MixtureConfig
from vtmix.signals import check_losses, make_signals, unit_of
from vtmix.stores import fetch
from vtmix.verify import read_manifest, require_intact
from vtmix.weights import make_weights


@dataclass(frozen=True)
class Mixture:
    """One epoch's committed training data."""

    epoch: int
    folder: Path
    manifest: Manifest
    digest: str
    """SHA-256 of the manifest: names cache folders and ties checkpoints to the data they were trained on."""
    expanded: Path | None
    """Where a reader puts compressed shards when it has expanded them, so that the mixture stays as it is."""


def begin(config: MixtureConfig, base: Mapping[str, DomainLoss]) -> Mixture:
    """Fixes the configuration, commits the base model's losses, and gives epoch 1's mixture.

    Raises ConflictError when the run was begun with another configuration, LossError for losses that must not move
    weights (then nothing has changed), MissingError when a stage before has not been run.
    """
    _commit_losses(config, 0, base)
    weigh(config, 1)
    compile_epoch(config, 1)
    return mixture(config, 1)


def advance(config: MixtureConfig, epoch: int, losses: Mapping[str, DomainLoss]) -> Mixture | None:
    """Commits an epoch's losses and gives the next epoch's mixture, None after the last.

    Losses committed before are kept: a restarted trainer may bring them again. Raises LossError for losses that must
    not move weights; then nothing has changed.
    """
    _commit_losses(config, epoch, losses)
    if epoch >= config.epochs:
        return None
    weigh(config, epoch + 1)
    compile_epoch(config, epoch + 1)
    return mixture(config, epoch + 1)


def mixture(config: MixtureConfig, epoch: int) -> Mixture:
    """A committed mixture, every byte of which was held against its manifest; one in a store is fetched before.

    Raises MissingError when it does not exist, DamageError naming the files that changed.
    """
    run, store = run_folder(config), store_of(config, epoch)
    folder = run.mixture(epoch)
    if store is not None:
        kept = read_manifest(run.manifest(epoch), epoch)
        folder = fetch(store, kept, run.cache(kept.digest()))
    manifest = require_intact(folder)
    expanded = None
    if any(file.raw_bytes is not None for file in manifest.files):
        expanded = run.expanded(manifest.digest())
        shutil.rmtree(expanded, ignore_errors=True)  # no reader looks at what it expanded before
    return Mixture(epoch, folder, manifest, manifest.digest(), expanded)


def losses_of(config: MixtureConfig, epoch: int) -> Losses | None:
    """The committed losses after an epoch (0: the base model's), None when there are none."""
    path = run_folder(config).losses(epoch)
    return Losses.read(path, "") if path.exists() else None


def freeze(config: MixtureConfig) -> None:
    """Commits the configuration as resolved: it holds for the whole run, save for what only steers execution.

    Raises ConflictError naming every setting that changed since.
    """
    require_unchanged(config)
    path = run_folder(config).config
    if not path.exists():
        commit.publish_file(path, configuration.resolved(config).encode())


def require_unchanged(config: MixtureConfig) -> None:
    """Raises ConflictError naming every setting that changed since the run was begun."""
    path = run_folder(config).config
    if not path.exists():
        return
    # Read as a configuration, so that settings which a later version added take their defaults.
    begun = configuration.load(path).model_dump(mode="json", exclude={"run"})
    changed = configuration.differences(begun, config.model_dump(mode="json", exclude={"run"}))
    if changed:
        raise ConflictError(
            f"the run was begun with another configuration ({path}):\n  {listing(changed)}\n"
            "restore what changed, or start another run folder"
        )


def require_ready(config: MixtureConfig) -> None:
    """Raises what would stop the run at its first update of the weights: better now than after an evaluation.

    ConflictError when the configuration changed, MissingError naming the stage that has to run first.
    """
    require_unchanged(config)
    run = run_folder(config)
    open_ = [epoch for epoch in range(1, config.epochs + 1) if not run.weights(epoch).exists()]
    if 1 in open_:
        _detection(config, run)
    if open_ and (open_ != [1] or config.weights.update_before_first_epoch):
        _reference(config, run)


def weigh(config: MixtureConfig, epoch: int) -> tuple[Weights, bool]:
    """The weights of an epoch, committed; the flag is False when they were before, or are written by hand.

    Raises MissingError naming the stage that has to run first, LossError for losses that must not move weights.
    """
    run = run_folder(config)
    if run.weights(epoch).exists() and (by_hand := Weights.read(run.weights(epoch), "")).inputs is None:
        return by_hand, False
    updates = epoch > 1 or config.weights.update_before_first_epoch
    inputs, weights = _weights(config, run, epoch) if updates else _initial_weights(config, run)
    committed = Weights.committed(run.weights(epoch), inputs)
    if committed is not None:
        return committed, False
    return weights, weights.publish(run.weights(epoch))


def _initial_weights(config: MixtureConfig, run: RunFolder) -> tuple[Inputs, Weights]:
    """The weights before any update."""
    detection, sizes = _detection(config, run), _sizes(config, run)
    inputs: Inputs = {
        "settings": config.weights.model_dump(mode="json"),
        "domains": list(config.domains),
        "detection": detection.fingerprint() if detection else None,
        "sizes": sizes,
    }
    situation = Situation(
        epoch=1,
        domains=tuple(config.domains),
        settings=config.weights,
        knowledge=detection.distribution if detection else None,
        sizes=sizes,
    )
    return inputs, make_weights(situation, inputs, knowledge=detection.knowledge if detection else None)


def _weights(config: MixtureConfig, run: RunFolder, epoch: int) -> tuple[Inputs, Weights]:
    """The weights of an epoch after the losses of the one before."""
    losses = Losses.read(
        run.losses(epoch - 1), f"train epoch {epoch - 1} first" if epoch > 1 else "begin the run first"
    )
    check_losses(losses, tuple(config.domains))
    before = losses_of(config, epoch - 2) if epoch > 1 else None
    reference = _reference(config, run)
    start = _initial_weights(config, run) if config.weights.update_before_first_epoch else None
    if start and epoch == 1:
        origin, previous = start
    else:
        previous = Weights.read(run.weights(epoch - 1), f"weigh epoch {epoch - 1} first")
        origin = {"fingerprint": previous.fingerprint()}
    inputs: Inputs = {
        "settings": config.weights.model_dump(mode="json"),
        "previous": origin,
        "losses": losses.fingerprint(),
        "losses_before": before.fingerprint() if before else None,
        "reference": reference.fingerprint() if reference else None,
    }
    unit, detection = unit_of(losses, reference), _detection(config, run)
    situation = Situation(
        epoch=epoch,
        domains=tuple(config.domains),
        settings=config.weights,
        knowledge=detection.distribution if detection else None,
        sizes=_sizes(config, run),
        history=tuple(_history(config, run, epoch, start[1].weights if start else None, reference, unit)),
    )
    return inputs, make_weights(
        situation, inputs, unit=unit, losses=losses, losses_before=before, knowledge=previous.knowledge
    )


def _history(
    config: MixtureConfig,
    run: RunFolder,
    epoch: int,
    initial: Mapping[str, float] | None,
    reference: Reference | None,
    unit: LossUnit,
) -> Iterator[Trained]:
    """What was trained before an epoch, oldest first; with `initial` weights, the base model's losses count as well."""
    for number in range(1 if initial is None else 0, epoch):
        losses = Losses.read(run.losses(number), f"train epoch {number} first")
        before = losses_of(config, number - 1) if number else None
        weights = Weights.read(run.weights(number), f"weigh epoch {number} first").weights if number else initial
        yield Trained(weights or {}, make_signals(losses, before, reference, unit))


def _detection(config: MixtureConfig, run: RunFolder) -> DetectionReport | None:
    """The detection, where the algorithm starts from one; a rule of the user's own gets what there is."""
    algorithm = named(config.weights.algorithm)
    if not (algorithm.detects or algorithm.own):
        return None
    try:
        return DetectionReport.read(run.detection, "run `vtmix detect` first, or write the file by hand")
    except MissingError:
        if algorithm.detects:
            raise
        return None


def _reference(config: MixtureConfig, run: RunFolder) -> Reference | None:
    try:
        return Reference.read(run.reference, "run `vtmix reference` first, or write the file by hand")
    except MissingError:
        if named(config.weights.algorithm).refers:
            raise
        return None


def _sizes(config: MixtureConfig, run: RunFolder) -> dict[str, int] | None:
    """Samples in each pool, where the algorithm goes by them; None before they are built."""
    algorithm = named(config.weights.algorithm)
    if not (algorithm.sized or algorithm.own):
        return None
    if not all((run.pool(name) / POOL).exists() for name in config.domains):
        return None
    return {name: PoolManifest.read(run.pool(name) / POOL, "").samples for name in config.domains}


def _commit_losses(config: MixtureConfig, epoch: int, domains: Mapping[str, DomainLoss]) -> None:
    """Commits the losses after an epoch, and before them the configuration; refused, they leave nothing behind."""
    require_unchanged(config)
    run = run_folder(config)
    pools = open_pools(config)
    remedy = f"compile epoch {epoch} and train on it first"
    inputs: Inputs = {
        "mixture": Manifest.read(run.manifest(epoch), remedy).digest() if epoch else None,
        "eval_samples": eval_sizes(config, {name: pool.manifest for name, pool in pools.items()}),
        "eval_splits": {name: pool.manifest.eval.digest for name, pool in pools.items()},
    }
    committed = Losses.committed(run.losses(epoch), inputs)
    losses = committed or Losses(
        inputs=inputs,
        epoch=epoch,
        tokenizer=" ".join(sorted({str((pool.manifest.inputs or {}).get("tokenizer")) for pool in pools.values()})),
        mixture=inputs["mixture"],
        domains=dict(domains),
    )
    check_losses(losses, tuple(config.domains))
    freeze(config)
    if committed is None:
        losses.publish(run.losses(epoch))
