"""Pools, weights and a configuration made by hand, without a tokenizer or a model: what a compile needs and no more."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from vtmix import mds, pool
from vtmix.artifacts import EvalSplit, PoolManifest, PoolPart, Weights, run_folder
from vtmix.config import load
from vtmix.settings import MixtureConfig

SIZES = {"law": 90, "medicine": 40, "code": 25}
SHARES = {"law": 0.5, "medicine": 0.2, "code": 0.3}


def samples(domain: str, count: int, most_tokens: int = 40) -> Iterator[mds.Sample]:
    """Samples of a domain, the same on every machine."""
    numbers = random.Random(domain)
    for number in range(count):
        length = numbers.randint(2, most_tokens)
        input_ids = np.array([numbers.randrange(50_000) for _ in range(length)], np.int32)
        labels = np.where(np.arange(length) < length // 2, np.int32(-100), input_ids)
        yield mds.Sample(domain=domain, input_ids=input_ids, labels=labels, sample_id=f"{domain}-{number:06d}")


def write_pool(folder: Path, domain: str, content: list[mds.Sample], parts: int = 2) -> PoolManifest:
    """A pool of these samples, in this order, cut into so many parts."""
    folder.mkdir(parents=True)
    encoded = [mds.encode_sample(sample) for sample in content]
    tokens = [len(sample["input_ids"]) for sample in content]
    response_tokens = [int((sample["labels"] >= 0).sum()) for sample in content]
    written = []
    edges = [number * len(content) // parts for number in range(parts + 1)] if content else [0]
    for number, (start, stop) in enumerate(pairwise(edges)):
        path = folder / f"part-{number:05d}.arrow"
        columns = [[sample["sample_id"] for sample in content], tokens, response_tokens, encoded]
        table = pa.table([column[start:stop] for column in columns], schema=pool.PART_SCHEMA)
        size = sum(map(len, encoded[start:stop]))
        pool.write_ipc(path, table, pool.batch_rows(stop - start, size))
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        written.append(
            PoolPart(
                name=path.name,
                samples=stop - start,
                tokens=sum(tokens[start:stop]),
                response_tokens=sum(response_tokens[start:stop]),
                sample_bytes=size,
                bytes=len(data),
                sha256=digest,
            )
        )
    manifest = PoolManifest(
        inputs={"tokenizer": "by hand"},
        domain=domain,
        samples=len(content),
        tokens=sum(tokens),
        response_tokens=sum(response_tokens),
        bytes=sum(map(len, encoded)),
        max_sample_bytes=max(map(len, encoded), default=0),
        records=len(content),
        rejected=0,
        duplicates=0,
        truncated=0,
        overlong_dropped=0,
        leaks_dropped=0,
        eval=EvalSplit(samples=1, tokens=8, response_tokens=4, digest=domain),
        parts=tuple(written),
    )
    manifest.publish(folder / "pool.json")
    return manifest


def write_config(folder: Path, domains: Mapping[str, Any] = SIZES, **settings: Any) -> Path:
    """A mixture.yaml of small shards, whose sources and model need not exist."""
    content: dict[str, Any] = {
        "model": "none",
        "seed": 7,
        "epochs": 3,
        "samples_per_epoch": 120,
        "domains": {name: {"train": f"{name}.jsonl"} for name in domains},
        "mixture": {"shard_bytes": 8192},
        "weights": {"algorithm": "uniform"},
    }
    path = folder / "mixture.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content | settings, sort_keys=False))
    return path


def run_of(
    folder: Path, sizes: Mapping[str, int] = SIZES, shares: Mapping[str, float] = SHARES, **settings: Any
) -> MixtureConfig:
    """A run that is ready to compile epoch 1."""
    config = load(write_config(folder, sizes, **settings))
    run = run_folder(config)
    for name, size in sizes.items():
        write_pool(run.pool(name), name, list(samples(name, size)))
    write_weights(config, 1, shares)
    return config


def write_weights(config: MixtureConfig, epoch: int, shares: Mapping[str, float] = SHARES) -> None:
    """Weights of an epoch, as a person would write them."""
    Weights(epoch=epoch, weights=dict(shares)).publish(run_folder(config).weights(epoch))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its bytes; empty where there is no folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
