"""Writes an epoch's mixture as MDS shards: `python -m vtmix.compile --epoch 2`.

Shards are staged, each complete or absent; index.json, then manifest.json follow, and one rename publishes the mixture.
An interrupted compile resumes from the shards that are complete and yields the same bytes.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vtmix import commit, config, distribute, mds, progress
from vtmix.artifacts import (
    MANIFEST,
    DomainCount,
    Inputs,
    Manifest,
    MixtureFile,
    Packed,
    Plan,
    RunFolder,
    Weights,
    fingerprint,
    run_folder,
)
from vtmix.errors import ConflictError, MixtureError, VtmixError
from vtmix.overview import overview
from vtmix.plan import make_plan
from vtmix.pool import Pool, open_pool, pool_store
from vtmix.settings import Mixture, MixtureConfig
from vtmix.shards import ShardReport, ShardWriter, settle
from vtmix.staging import FolderStaging, Staging, StoreStaging
from vtmix.stores import Store

FORMAT = "mds-2"


def open_pools(config: MixtureConfig) -> dict[str, Pool]:
    """The committed pool of every domain."""
    run = run_folder(config)
    return {name: open_pool(run.pool(name), pool_store(config, name)) for name in config.domains}


def planned(config: MixtureConfig, epoch: int, pools: Mapping[str, Pool]) -> Plan:
    """The plan of an epoch from its weights, its pools and the plan of the epoch before; nothing is written.

    Raises MissingError without weights, MixtureError when the pools cannot serve them, ConflictError when another plan
    is committed.
    """
    run = run_folder(config)
    step = f"train epoch {epoch - 1}" if epoch > 1 else f"run `vtmix weights --epoch {epoch}`"
    remedy = f"{step} first, or write the file by hand"
    weights = Weights.read(run.weights(epoch), remedy)
    _require_epoch(run.weights(epoch), weights.epoch, epoch)
    previous = Plan.read(run.plan(epoch - 1), f"compile epoch {epoch - 1} first") if epoch > 1 else None
    plan = make_plan(
        weights,
        {name: pool.manifest for name, pool in pools.items()},
        samples=config.samples_per_epoch,
        seed=config.seed,
        shard_bytes=config.mixture.shard_bytes,
        packing=config.mixture.packing,
        max_passes=config.mixture.max_passes,
        previous=previous,
        unit=config.mixture.unit,
        supplies=pools,
    )
    committed = Plan.committed(run.plan(epoch), plan.inputs or {})
    if committed is not None:
        _require_epoch(run.plan(epoch), committed.epoch, epoch)
    return committed or plan


def commit_plan(config: MixtureConfig, plan: Plan) -> bool:
    """Commits an epoch's plan; False when it was before, or is written by hand."""
    path = run_folder(config).plan(plan.epoch)
    return not path.exists() and plan.publish(path)


def _require_epoch(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise MixtureError(f"{path}: says it is for epoch {found}, expected {expected}: correct it")


def mixture_inputs(plan: Plan, layout: mds.Layout) -> Inputs:
    """What a mixture is made from: its plan in full, so that a difference can be named."""
    return {
        "format": FORMAT,
        "shard_bytes": layout.size_limit,
        "compression": layout.compression,
        "packing": layout.packing and layout.packing.model_dump(),
        "plan": plan.model_dump(mode="json", exclude={"inputs"}),
    }


def made_from(manifest: Manifest) -> tuple[Plan, mds.Layout]:
    """The plan and the layout a mixture was made from, which its manifest holds in full.

    Raises ValueError, TypeError or KeyError when its inputs are not those of a mixture.
    """
    inputs = manifest.inputs or {}
    stated = {name: inputs[name] for name in ("shard_bytes", "compression", "packing")}
    # Held against what settings may be, since a manifest may say anything.
    return Plan.model_validate(inputs["plan"]), _layout(Mixture.model_validate(stated))


def layout_of(config: MixtureConfig) -> mds.Layout:
    """The layout of a configuration's mixtures."""
    return _layout(config.mixture)


def _layout(settings: Mixture) -> mds.Layout:
    return mds.Layout(settings.shard_bytes, settings.compression, settings.packing)


def compile_epoch(
    config: MixtureConfig, epoch: int, workers: int | None = None, *, backend: distribute.Backend = "threads"
) -> tuple[Manifest, bool]:
    """Plans and compiles an epoch; the flag is False when its mixture was committed before.

    With the backend `ray`, shards are tasks on the connected cluster, whose workers see the run folder.

    Raises ConflictError when a mixture of other inputs is committed, LockedError while another compile is at work.
    """
    # Planned before the lock is taken, which makes a file: what is refused here leaves no trace.
    pools = open_pools(config)
    plan = planned(config, epoch, pools)
    run, layout, store = run_folder(config), layout_of(config), store_of(config, epoch)
    inputs = mixture_inputs(plan, layout)
    if run.plan(epoch).exists() and (committed := _committed(run, epoch, store, inputs)):
        return committed, False
    with commit.lock(run.path, "compile"):
        commit_plan(config, plan)
        if committed := _committed(run, epoch, store, inputs):
            return committed, False
        removed = Manifest.committed(run.kept_manifest(epoch), inputs)
        writer, identity = ShardWriter(plan, pools, layout), fingerprint(inputs)
        final = run.mixture(epoch)
        elsewhere = backend == "ray"  # what another machine wrote is flushed there, not here
        staging = StoreStaging(store, final, identity) if store else FolderStaging(final, identity, flush=elsewhere)
        manifest = _staged(writer, staging, inputs, workers, backend)
        if removed is not None and removed.digest() != manifest.digest():
            raise ConflictError(
                f"epoch {epoch} comes out with other bytes than it had when it was removed: compress with the version "
                "of pyarrow it was compiled with, or start another run folder"
            )
        staging.publish()
        _keep(run, manifest, store)
    return manifest, True


def store_of(config: MixtureConfig, epoch: int) -> Store | None:
    """Where an epoch's mixture stands in a store; None where it stands in the run folder."""
    store = config.mixture.store
    return Store(store).below(run_folder(config).mixture(epoch).name) if store else None


def where(config: MixtureConfig, epoch: int) -> str:
    """Where an epoch's mixture stands, for people."""
    store = store_of(config, epoch)
    return store.url if store else str(run_folder(config).mixture(epoch))


def _committed(run: RunFolder, epoch: int, store: Store | None, inputs: Inputs) -> Manifest | None:
    """Raises ConflictError when another mixture stands there, or something that is none."""
    if store is not None:
        content = store.read(MANIFEST)
        if content is None:
            return None
        found = Manifest.decode(content, f"{store.url}/{MANIFEST}").require(inputs, f"{store.url}/{MANIFEST}")
        _keep(run, found, store)
        return found
    final = run.mixture(epoch)
    committed = Manifest.committed(final / MANIFEST, inputs)
    if committed is None and final.exists():
        raise ConflictError(f"{final}: exists without {MANIFEST}, so vtmix did not write it: move it away")
    return committed


def _keep(run: RunFolder, manifest: Manifest, store: Store | None) -> None:
    """The run folder holds every manifest once: within the mixture, or beside its place where that is elsewhere."""
    if store is None:
        run.kept_manifest(manifest.epoch).unlink(missing_ok=True)
    else:
        manifest.publish(run.kept_manifest(manifest.epoch))


def _staged(
    writer: ShardWriter, staging: Staging, inputs: Inputs, workers: int | None, backend: distribute.Backend
) -> Manifest:
    """Completes a mixture, unless it was and only had to be published."""
    if content := staging.staged():
        return Manifest.decode(content, MANIFEST)
    shards = _write_shards(writer, staging, workers, backend)
    index = writer.layout.index([shard.size for shard in shards])
    manifest = _manifest(writer, inputs, index, shards)
    staging.stage(index, manifest.text())
    return manifest


def _write_shards(
    writer: ShardWriter, staging: Staging, workers: int | None, backend: distribute.Backend
) -> list[ShardReport]:
    tasks = writer.tasks()
    reports = []
    with progress.bar(f"compiling epoch {writer.plan.epoch}", len(tasks), "shards") as advance:
        # Threads: gathering, hashing and writing all release the interpreter lock. Waiting for the disk is done here,
        # while they write the next shards.
        for report in distribute.run(lambda task: writer.write(task, staging), tasks, backend=backend, workers=workers):
            settle(staging, report)
            reports.append(report)
            advance(1)
    return sorted(reports, key=lambda report: report.number)


def _manifest(writer: ShardWriter, inputs: Inputs, index: bytes, shards: Sequence[ShardReport]) -> Manifest:
    plan = writer.plan
    files = [MixtureFile(name=mds.INDEX, bytes=len(index), sha256=hashlib.sha256(index).hexdigest())]
    files += [
        MixtureFile(
            name=shard.name,
            bytes=shard.bytes,
            sha256=shard.sha256,
            raw_bytes=shard.raw_bytes,
            sequences=shard.sequences,
        )
        for shard in shards
    ]
    domains = {
        name: DomainCount(
            weight=domain.weight,
            samples=domain.count,
            proportion=domain.count / plan.samples,
            tokens=sum(shard.tokens[name] for shard in shards),
            response_tokens=sum(shard.response_tokens[name] for shard in shards),
        )
        for name, domain in plan.domains.items()
    }
    tokens = sum(domain.tokens for domain in domains.values())
    return Manifest(
        inputs=inputs,
        epoch=plan.epoch,
        fingerprint_of_inputs=fingerprint(inputs),
        knowledge=plan.knowledge,
        samples=plan.samples,
        tokens=tokens,
        bytes=sum(shard.bytes for shard in shards),
        packing=packing_of(writer.layout, tokens, files),
        domains=domains,
        files=tuple(files),
    )


def packing_of(layout: mds.Layout, tokens: int, files: Sequence[MixtureFile]) -> Packed | None:
    """What a manifest says of the sequences of its files; None where samples are not packed."""
    if layout.packing is None:
        return None
    sequences = sum(file.sequences or 0 for file in files)
    return Packed(sequences=sequences, utilisation=tokens / max(sequences * layout.packing.length, 1))


def describe(plan: Plan, config: MixtureConfig) -> Iterator[str]:
    """A plan in words, with its difference from the epoch before, and the fingerprint of the mixture it leads to."""
    run = run_folder(config)
    before, first = (
        Plan.read(run.plan(epoch), "") if run.plan(epoch).exists() else None for epoch in (plan.epoch - 1, 1)
    )
    yield from overview(plan, before, first if plan.epoch > 1 else plan)
    yield f"fingerprint {fingerprint(mixture_inputs(plan, layout_of(config)))}"


def summarise(manifest: Manifest, config: MixtureConfig, *, fresh: bool) -> str:
    """What a compile did, in one line."""
    size = f"{manifest.samples:,} samples, {manifest.tokens:,} tokens, {manifest.bytes / 2**20:.1f} MiB"
    if manifest.packing:
        size += f", {manifest.packing.sequences:,} sequences {manifest.packing.utilisation:.1%} full"
    state = "committed" if fresh else "up to date"
    return f"{state}: {where(config, manifest.epoch)} ({size} in {len(manifest.files) - 1} shards)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m vtmix.compile`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vtmix.compile",
        description="Compiles an epoch's mixture from its weights: plan/epoch-000N.json and mixture/epoch-000N/.",
        epilog="A compile that was interrupted resumes; one that is up to date writes nothing.",
    )
    parser.add_argument("--epoch", type=_positive, required=True, help="the epoch to compile, from 1")
    parser.add_argument("--config", help="the configuration (default: ./mixture.yaml)")
    parser.add_argument("--run", help="the run folder, instead of the one the configuration names")
    parser.add_argument("--workers", type=_positive, help="threads that write shards (default: one per core)")
    parser.add_argument("--dry-run", action="store_true", help="print counts and fingerprint, write nothing")
    options = parser.parse_args(arguments)
    try:
        settings = config.load(options.config, options.run)
        if options.dry_run:
            for line in describe(planned(settings, options.epoch, open_pools(settings)), settings):
                print(line)
            return 0
        manifest, fresh = compile_epoch(settings, options.epoch, options.workers)
        print(summarise(manifest, settings, fresh=fresh))
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: run again to go on from the shards that are complete", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
