"""Builds pools: maps over the parts of the sources (parts.py), reduces each domain range by range of keys (reduce.py),
refuses what must not be trained on, and assembles and publishes each pool (assemble.py).

The result does not depend on how the sources were cut, on how many workers ran, or on who did the work. Workers write
into the folders `encoded` and `reduced` of a staging folder, and only this process into the one that is published: a
worker that was given up for dead and still writes can touch no pool. A worker holds one part of a source or one range
of keys at a time, this process a few numbers of each.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vtmix import cluster, commit, distribute, progress, reduce
from vtmix.artifacts import Inputs, PoolManifest, fingerprint, run_folder
from vtmix.assemble import write_pool
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.errors import LISTED, LeakError, Offenders, RecordError, listing
from vtmix.leaks import CommittedPart, CommittedPool, EvalSplits, committed_leaks
from vtmix.parts import ENVIRONMENT, EncodeTask, Encodings, encode_part
from vtmix.pool import mirror, pool_store, push
from vtmix.ranges import EncodedDomain, Split, key_ranges
from vtmix.reduce import Reduced, ReduceTask, reduce_range
from vtmix.settings import LanguageModel, MixtureConfig
from vtmix.sources import SourceParts, open_source
from vtmix.stores import Store

WORKER_BYTES = 16 << 20
"""Text from which on another worker process is worth its start: seconds of imports, and the tokenizer itself uses every
core within one process.
"""
WORKER_RANGES = 8
"""Ranges from which on another worker process is worth its start."""

Sources = Mapping[str, Sequence[SourceParts]]
"""The opened sources of a domain: `train` and `eval`."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Building:
    """One domain on its way to a pool."""

    inputs: Inputs
    final: Path
    staging: Path
    encoded: EncodedDomain
    tasks: tuple[EncodeTask, ...]


@dataclass(frozen=True)
class _Workers:
    """Who does the work: `count` workers, or as many as there are cores and the work justifies."""

    backend: distribute.Backend
    count: int | None

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        justified: int,
        what: str,
        unit: str,
    ) -> list[Result]:
        """The results of all tasks, in order of completion."""
        workers = self.count
        if workers is None and self.backend != "ray":
            workers = min(distribute.cores(), justified)
        if workers is not None:
            workers = max(1, min(workers, len(tasks)))
        found = []
        with progress.bar(what, len(tasks), unit) as advance:
            for result in distribute.run(
                function, tasks, backend=self.backend, workers=workers, environment=ENVIRONMENT
            ):
                found.append(result)
                advance(1)
        return found


def build(
    config: MixtureConfig,
    *,
    folder: Path | None = None,
    model: LanguageModel | None = None,
    backend: distribute.Backend = "processes",
    workers: int | None = None,
) -> dict[str, PoolManifest]:
    """Builds every domain's pool that is not committed yet, and returns all of them.

    `folder` and `model` (defaults: the run's) give another place and another tokenizer. Without `workers`, there are as
    many as the cores and the amount of data justify; with the backend `ray`, as many as the cluster has CPUs, on which
    sources and folder have to be visible by the same paths. Raises RecordError naming every source or record that
    cannot be used, LeakError naming training samples that stand in an eval split, ConflictError where a pool exists
    that was made from other inputs, ConfigError where the pools would be lost after a job; then nothing is published.
    """
    run = run_folder(config)
    cluster.require_durable(run)
    folder = folder or run.pools
    stores = {} if model else {name: store for name in config.domains if (store := pool_store(config, name))}
    with commit.lock(folder, "pool"):
        for name, store in stores.items():
            mirror(store, folder / name)
        pools, buildings = _outstanding(config, folder, model or config.model)
        if buildings:
            with cluster.connect() if backend == "ray" else nullcontext():
                pools |= _build(config, folder, pools, buildings, stores, _Workers(backend, workers))
        for name, store in stores.items():
            push(folder / name, store)
    return {name: pools[name] for name in config.domains}


def _build(
    config: MixtureConfig,
    folder: Path,
    pools: Mapping[str, PoolManifest],
    buildings: Mapping[str, _Building],
    stores: Mapping[str, Store],
    workers: _Workers,
) -> dict[str, PoolManifest]:
    """Builds the outstanding pools, held against those that are committed."""
    encodings = _encode_all(buildings, workers)
    _refuse_bad_records(encodings, config)
    committed = tuple(
        CommittedPool(name, folder / name, pools[name].inputs is not None, stores.get(name)) for name in pools
    )
    fresh = tuple(building.encoded for building in buildings.values())
    inputs = {name: pool.inputs or pool.fingerprint() for name, pool in pools.items()}
    inputs |= {name: building.inputs for name, building in buildings.items()}
    splits = EvalSplits(fresh, committed, config.pool.seed)
    reduced = _reduce_all(buildings, encodings, splits, fingerprint(inputs), workers)
    parts = [
        CommittedPart(pool, number, EvalSplits(fresh, (), config.pool.seed))
        for pool in committed
        for number, part in enumerate(pools[pool.domain].parts)
        if part.samples
    ]
    leaks = workers.map(committed_leaks, parts, len(parts) // WORKER_RANGES, "searching committed pools", "parts")
    _refuse_leaks([part.leaks for part in reduced], sorted(leaks), config)
    return {
        name: _publish(
            building,
            [found for found in encodings if found.task.domain == name],
            [found for found in reduced if found.task.encoded.domain == name],
            config,
        )
        for name, building in buildings.items()
    }


def _outstanding(
    config: MixtureConfig, folder: Path, model: LanguageModel
) -> tuple[dict[str, PoolManifest], dict[str, _Building]]:
    """The pools that are committed, and what is to be built."""
    opened = _open_sources(config)
    location = config.model_location(model)
    tokenizer = tokenizer_digest(load_tokenizer(location, model.revision))
    pools, buildings = {}, {}
    for domain, sources in opened.items():
        inputs = _inputs(config, domain, tokenizer, sources)
        final = folder / domain
        committed = PoolManifest.committed(final / "pool.json", inputs)
        if committed is not None:
            commit.discard_staging(final)  # left by a build that was killed when it had just published
            pools[domain] = committed
            continue
        parts = [(part, split == "eval") for split in sources for source in sources[split] for part in source.parts]
        # Encoded parts that an interrupted build left are taken up only where the sources are cut in the same way.
        cuts = [(part.name, part.start, part.stop) for part, _ in parts]
        staging = commit.staging_folder(final, fingerprint({"inputs": inputs, "cuts": cuts}))
        encoded = EncodedDomain(domain, staging / "encoded", len(parts))
        tasks = tuple(
            EncodeTask(
                domain=domain,
                part=part,
                eval_source=is_eval,
                model=location,
                revision=model.revision,
                tokenizer=tokenizer,
                encoding=config.encoding,
                seed=config.pool.seed,
                eval_fraction=inputs["eval_fraction"],
                out=encoded.part(number),
            )
            for number, (part, is_eval) in enumerate(parts)
        )
        buildings[domain] = _Building(inputs, final, staging, encoded, tasks)
    return pools, buildings


def _open_sources(config: MixtureConfig) -> dict[str, Sources]:
    opened: dict[str, Sources] = {}
    offenders = []
    for domain, settings in config.domains.items():
        splits: dict[str, list[SourceParts]] = {"train": [], "eval": []}
        for split, source in [*(("train", s) for s in settings.train), *(("eval", s) for s in settings.eval)]:
            try:
                splits[split].append(open_source(source, config))
            except RecordError as error:
                offenders.append(f"domain '{domain}': {error}")
        opened[domain] = splits
    if offenders:
        raise RecordError(listing(offenders, LISTED))
    return opened


def _inputs(config: MixtureConfig, domain: str, tokenizer: str, opened: Sources) -> Inputs:
    """What a pool is made from, keyed so that a difference is named down to the file or setting."""
    settings = config.domains[domain].model_dump(mode="json")
    return {
        "encoding": config.encoding.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "seed": config.pool.seed,
        "eval_fraction": None if config.domains[domain].eval else config.pool.eval_fraction,
        "leak": config.pool.leak,
        "texts": config.pool.texts,
        "sources": {split: {str(n): source for n, source in enumerate(settings[split])} for split in opened},
        "files": {split: {k: v for s in opened[split] for k, v in s.digests.items()} for split in opened},
    }


def _encode_all(buildings: Mapping[str, _Building], workers: _Workers) -> list[Encodings]:
    tasks = [task for building in buildings.values() for task in building.tasks]
    for building in buildings.values():
        commit.make_folder(building.encoded.folder)
    text = sum(task.part.size for task in tasks if not task.out.exists())
    found = workers.map(encode_part, tasks, text // WORKER_BYTES, "encoding records", "parts")
    return sorted(found, key=lambda done: done.task.out)


def _refuse_bad_records(encodings: Sequence[Encodings], config: MixtureConfig) -> None:
    rejected = _together([part.rejected for part in encodings])
    if rejected.total > config.pool.max_bad_records:
        raise RecordError(
            f"{rejected.total:,} of {sum(part.records for part in encodings):,} records cannot be used "
            f"(pool.max_bad_records is {config.pool.max_bad_records}), no pool was built:\n"
            f"  {listing(rejected.first, LISTED, count=rejected.total)}"
        )


def _reduce_all(
    buildings: Mapping[str, _Building],
    encodings: Sequence[Encodings],
    splits: EvalSplits,
    inputs: str,
    workers: _Workers,
) -> list[Reduced]:
    both: tuple[Split, ...] = ("train", "eval")
    tasks = []
    for name, building in buildings.items():
        folder = building.staging / "reduced"
        commit.make_folder(folder)
        for split in both:
            size = sum(found.sample_bytes[split] for found in encodings if found.task.domain == name)
            for number, keys in enumerate(key_ranges(size, reduce.PART_BYTES)):
                tasks.append(ReduceTask(building.encoded, split, number, keys, splits, inputs, folder))
    found = workers.map(reduce_range, tasks, len(tasks) // WORKER_RANGES, "putting samples in order", "ranges")
    return sorted(found, key=lambda done: done.task.out)


def _refuse_leaks(fresh: Sequence[Offenders], committed: Sequence[Offenders], config: MixtureConfig) -> None:
    """Raises LeakError where leaks stop the build, or stand in a pool that is committed and so cannot drop them."""
    leaks = _together([*fresh, *committed])
    remedy = "remove them, or set pool.leak to 'drop'"
    if config.pool.leak == "drop":
        leaks = _together(committed)
        remedy = "a committed pool cannot drop them: remove them from the eval split, or start another pool folder"
    if leaks.total:
        raise LeakError(
            f"{leaks.total:,} training samples also stand in an eval split, no pool was built ({remedy}):\n"
            f"  {listing(leaks.first, LISTED, count=leaks.total)}"
        )


def _together(found: Sequence[Offenders]) -> Offenders:
    return Offenders(sum(some.total for some in found), tuple(line for some in found for line in some.first))


def _publish(
    building: _Building, encodings: Sequence[Encodings], reduced: Sequence[Reduced], config: MixtureConfig
) -> PoolManifest:
    """Assembles and publishes one domain's pool."""
    folder = building.staging / "pool"
    if folder.exists():  # left by an interrupted build
        shutil.rmtree(folder)
    train = [part for part in reduced if part.task.split == "train"]
    held_out = [part for part in reduced if part.task.split == "eval"]
    manifest = PoolManifest(
        inputs=building.inputs,
        domain=building.encoded.domain,
        records=sum(part.records for part in encodings),
        rejected=sum(part.rejected.total for part in encodings),
        truncated=sum(part.truncated for part in encodings),
        overlong_dropped=sum(part.overlong_dropped for part in encodings),
        **write_pool(folder, train, held_out, config.pool.texts),
    )
    commit.write_staged(folder / "pool.json", manifest.text())
    commit.publish_folder(folder, building.final)
    # A worker that was given up for dead may still write there: what is left is removed by the next build.
    shutil.rmtree(building.staging, ignore_errors=True)
    return manifest
