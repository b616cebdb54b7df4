"""Builds pools: maps over the parts of the sources (parts.py), refuses what must not be trained on, and reduces each
domain's parts to its pool (reduce.py).

The result does not depend on how the sources were cut or on how many workers ran.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from vtmix import commit, distribute, mds, progress
from vtmix.artifacts import Inputs, PoolManifest, fingerprint, run_folder
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.errors import LeakError, RecordError, listing
from vtmix.parts import EncodeTask, Encodings, encode_part
from vtmix.pool import mirror, open_pool, pool_store, push
from vtmix.reduce import EncodedDomain, write_pool
from vtmix.settings import LanguageModel, MixtureConfig
from vtmix.sources import SourceParts, open_source
from vtmix.stores import Store

WORKER_BYTES = 16 << 20
"""Text from which on another worker process is worth its start: seconds of imports, and the tokenizer itself uses every
core within one process.
"""
LISTED = 100
ENCODED = "encoded"

Sources = Mapping[str, Sequence[SourceParts]]
"""The opened sources of a domain: `train` and `eval`."""


@dataclass(frozen=True)
class _Building:
    """One domain on its way to a pool."""

    domain: str
    inputs: Inputs
    final: Path
    staging: Path
    tasks: tuple[EncodeTask, ...]


class _Leak(NamedTuple):
    """A training sample that also stands in an eval split."""

    domain: str
    sample_id: str
    what: str


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
    many as the cores and the amount of text justify. Raises RecordError naming every source or record that cannot be
    used, LeakError naming training samples that stand in an eval split, ConflictError where a pool exists that was made
    from other inputs; then nothing is published.
    """
    folder = folder or run_folder(config).pools
    stores = {} if model else {name: store for name in config.domains if (store := pool_store(config, name))}
    with commit.lock(folder, "pool"):
        for name, store in stores.items():
            mirror(store, folder / name)
        pools, buildings = _outstanding(config, folder, model or config.model)
        if buildings:
            encodings = _encode_all(buildings, backend, workers)
            _refuse_bad_records(encodings, config)
            encoded = {building.domain: EncodedDomain([task.out for task in building.tasks]) for building in buildings}
            leaks = _leaks(encoded, pools, folder, stores)
            _refuse_leaks(leaks, pools, config)
            for building in buildings:
                mine = [found for found in encodings if found.task.domain == building.domain]
                dropped = [leak.sample_id for leak in leaks if leak.domain == building.domain]
                pools[building.domain] = _reduce(building, mine, encoded.pop(building.domain), dropped, config)
        for name, store in stores.items():
            push(folder / name, store)
    return {name: pools[name] for name in config.domains}


def _outstanding(
    config: MixtureConfig, folder: Path, model: LanguageModel
) -> tuple[dict[str, PoolManifest], list[_Building]]:
    """The pools that are committed, and what is to be built."""
    opened = _open_sources(config)
    location = config.model_location(model)
    tokenizer = tokenizer_digest(load_tokenizer(location, model.revision))
    pools, buildings = {}, []
    for domain, sources in opened.items():
        inputs = _inputs(config, domain, tokenizer, sources)
        committed = PoolManifest.committed(folder / domain / "pool.json", inputs)
        if committed is not None:
            pools[domain] = committed
            continue
        parts = [(part, split == "eval") for split in sources for source in sources[split] for part in source.parts]
        # Encoded parts that an interrupted build left are taken up only where the sources are cut in the same way.
        cuts = [(part.name, part.start, part.stop) for part, _ in parts]
        staging = commit.staging_folder(folder / domain, fingerprint({"inputs": inputs, "cuts": cuts}))
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
                out=staging / ENCODED / f"{number:06d}.arrow",
            )
            for number, (part, is_eval) in enumerate(parts)
        )
        buildings.append(_Building(domain, inputs, folder / domain, staging, tasks))
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


def _encode_all(buildings: Sequence[_Building], backend: distribute.Backend, workers: int | None) -> list[Encodings]:
    tasks = [task for building in buildings for task in building.tasks]
    for building in buildings:
        commit.make_folder(building.staging / ENCODED)
    if workers is None and backend != "ray":
        text = sum(task.part.size for task in tasks if not task.out.exists())
        workers = min(distribute.cores(), text // WORKER_BYTES)
    if workers is not None:
        workers = max(1, min(workers, len(tasks)))
    found = []
    with progress.bar("encoding records", len(tasks), "parts") as advance:
        for encodings in distribute.run(encode_part, tasks, backend=backend, workers=workers):
            found.append(encodings)
            advance(1)
    return sorted(found, key=lambda done: done.task.out)


def _refuse_bad_records(encodings: Sequence[Encodings], config: MixtureConfig) -> None:
    bad = [f"{found.where}: {found.why}" for part in encodings for found in part.rejected]
    if len(bad) > config.pool.max_bad_records:
        raise RecordError(
            f"{len(bad):,} of {sum(part.records for part in encodings):,} records cannot be used "
            f"(pool.max_bad_records is {config.pool.max_bad_records}), no pool was built:\n  {listing(bad, LISTED)}"
        )


def _leaks(
    encoded: Mapping[str, EncodedDomain], pools: Mapping[str, PoolManifest], folder: Path, stores: Mapping[str, Store]
) -> list[_Leak]:
    """Every training sample that also stands in an eval split, unless both were committed before."""
    fresh = {identity: domain for domain, samples in encoded.items() for identity in samples.held_out["sample_id"]}
    committed = {sample["sample_id"]: domain for domain in pools for sample in mds.Samples(folder / domain / "eval")}
    held_out = committed | fresh
    leaks = []
    for domain, samples in encoded.items():
        hits = samples.train.filter(pl.col("sample_id").is_in(list(held_out)))
        for where, identity in zip(samples.where(hits), hits["sample_id"], strict=True):
            what = f"{where}: sample {identity} of '{domain}' also stands in the eval split of '{held_out[identity]}'"
            leaks.append(_Leak(domain, identity, what))
    for domain in pools:
        for identity in open_pool(folder / domain, stores.get(domain)).sample_ids():
            if identity in fresh:
                what = f"sample {identity} of '{domain}' also stands in the eval split of '{fresh[identity]}'"
                leaks.append(_Leak(domain, identity, f"{folder / domain}: {what}"))
    return leaks


def _refuse_leaks(leaks: Sequence[_Leak], pools: Mapping[str, PoolManifest], config: MixtureConfig) -> None:
    """Raises LeakError where leaks stop the build, or stand in a pool that is committed and so cannot drop them."""
    remedy = "remove them, or set pool.leak to 'drop'"
    if config.pool.leak == "drop":
        leaks = [leak for leak in leaks if leak.domain in pools]
        remedy = "a committed pool cannot drop them: remove them from the eval split, or start another pool folder"
    if leaks:
        raise LeakError(
            f"{len(leaks):,} training samples also stand in an eval split, no pool was built ({remedy}):\n"
            f"  {listing((leak.what for leak in leaks), LISTED)}"
        )


def _reduce(
    building: _Building,
    encodings: Sequence[Encodings],
    encoded: EncodedDomain,
    leaks: Sequence[str],
    config: MixtureConfig,
) -> PoolManifest:
    """Writes and publishes one domain's pool."""
    staging = building.staging
    for left in staging.iterdir():  # by an interrupted build, whose leaks may have been others
        if left.name != ENCODED:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    manifest = PoolManifest(
        inputs=building.inputs,
        domain=building.domain,
        records=sum(part.records for part in encodings),
        rejected=sum(len(part.rejected) for part in encodings),
        truncated=sum(part.truncated for part in encodings),
        overlong_dropped=sum(part.overlong_dropped for part in encodings),
        **write_pool(staging, encoded, leaks, config.pool.texts),
    )
    commit.write_staged(staging / "pool.json", manifest.text())
    shutil.rmtree(staging / ENCODED)
    commit.publish_folder(staging, building.final)
    return manifest
