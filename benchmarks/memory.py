"""Does compiling need memory for more than its shards? An epoch from pools many times larger than memory.

    python benchmarks/memory.py [--gib 8] [--limit-mib 512] [--json]

Writes pools of so many GiB and compiles one pass over them, in a process that is held to so much memory by a control
group, its share of the page cache included. The peer is `cp -r` of the pools, held to the same. Where this user may not
make control groups, nothing is limited and the peak alone is reported. Takes twice the size on disk.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from shared import compiled, end, run

from vtmix import config, mds, pool
from vtmix.artifacts import EvalSplit, PoolManifest, PoolPart, Weights, run_folder
from vtmix.settings import MixtureConfig

TOKENS = 1024
PART_BYTES = 1 << 26
DOMAINS = ("law", "code", "other")
GROUPS = Path("/sys/fs/cgroup")


def write_pool(folder: Path, domain: str, size: int) -> None:
    """A pool of random samples of TOKENS tokens, in parts as vtmix cuts them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(domain))
    empty = np.zeros(TOKENS, np.int32)
    name = f"{domain}-{0:012d}"
    template = mds.encode_sample({"domain": domain, "input_ids": empty, "labels": empty, "sample_id": name})
    width = len(template)
    rows = PART_BYTES // width
    _, (ids,), (labels,) = mds.token_spans(np.frombuffer(template, np.uint8), np.array([0, width]))
    parts = []
    for number in range(-(-size // (rows * width))):
        block = np.tile(np.frombuffer(template, np.uint8), (rows, 1))
        block[:, ids : ids + 4 * TOKENS] = rng.integers(0, 32_000, (rows, TOKENS), np.int32).view(np.uint8)
        block[:, labels : labels + 4 * TOKENS] = block[:, ids : ids + 4 * TOKENS]
        names = [f"{domain}-{number * rows + row:012d}" for row in range(rows)]
        block[:, -len(name) :] = np.frombuffer("".join(names).encode(), np.uint8).reshape(rows, -1)
        edges = np.arange(rows + 1, dtype=np.int64) * width
        counts = pa.array([TOKENS] * rows, pa.int32())
        encoded = pa.Array.from_buffers(
            pa.large_binary(), rows, [None, pa.py_buffer(edges), pa.py_buffer(block.reshape(-1))]
        )
        table = pa.table([pa.array(names), counts, counts, encoded], schema=pool.PART_SCHEMA)
        path = folder / f"part-{number:05d}.arrow"
        pool.write_ipc(path, table, pool.batch_rows(rows, rows * width))
        parts.append(
            PoolPart(
                name=path.name,
                samples=rows,
                tokens=rows * TOKENS,
                response_tokens=rows * TOKENS,
                sample_bytes=rows * width,
                bytes=path.stat().st_size,
                sha256="",
            )
        )
    samples = rows * len(parts)
    PoolManifest(
        inputs={"tokenizer": "none"},
        domain=domain,
        samples=samples,
        tokens=samples * TOKENS,
        response_tokens=samples * TOKENS,
        bytes=samples * width,
        max_sample_bytes=width,
        records=samples,
        rejected=0,
        duplicates=0,
        truncated=0,
        overlong_dropped=0,
        leaks_dropped=0,
        eval=EvalSplit(samples=0, tokens=0, response_tokens=0, digest=""),
        parts=tuple(parts),
    ).publish(folder / pool.POOL)


def prepare(folder: Path, size: int) -> MixtureConfig:
    """Pools of so many bytes in all, and weights that take every sample once."""
    raw = {"model": "none", "domains": {name: {"train": "-"} for name in DOMAINS}, "weights": {"algorithm": "uniform"}}
    run = run_folder(config.validate(raw, folder / "mixture.yaml"))
    for name in DOMAINS:
        write_pool(run.pool(name), name, size // len(DOMAINS))
    sizes = {name: PoolManifest.read(run.pool(name) / pool.POOL, "").samples for name in DOMAINS}
    total = sum(sizes.values())
    (folder / "mixture.json").write_text(json.dumps(raw | {"samples_per_epoch": total}))
    settings = config.validate(raw | {"samples_per_epoch": total}, folder / "mixture.yaml")
    Weights(epoch=1, weights={name: found / total for name, found in sizes.items()}).publish(run.weights(1))
    return settings


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A control group (of Linux's version 1 or 2) held to so many bytes; None where this user may not make one."""
    second = not (GROUPS / "memory").is_dir()
    folder = (GROUPS if second else GROUPS / "memory") / f"vtmix-{os.getpid()}"
    made: Path | None = None
    with contextlib.suppress(OSError):
        folder.mkdir()
        made = folder
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit))
    try:
        yield made
    finally:
        if made is not None:
            made.rmdir()


def limited(command: list[str], within: Path | None) -> str:
    """What a command prints that is run within a control group."""
    enter = f'echo $$ > "{within / "cgroup.procs"}" && ' if within else ""
    done = subprocess.run(
        ["/bin/bash", "-c", enter + 'exec "$@"', "bash", *command], check=True, capture_output=True, text=True
    )
    return done.stdout


def child(folder: Path, workers: int) -> None:
    """Compiles in this process and prints what it took."""
    settings = config.validate(json.loads((folder / "mixture.json").read_text()), folder / "mixture.yaml")
    print(json.dumps(compiled(settings, workers)))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="pools of 1 GiB: does it run?")
    parser.add_argument("--gib", type=float, default=8, help="size of the pools")
    parser.add_argument("--limit-mib", type=int, default=512, help="memory, page cache included")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.workers)
        return 0
    size = int((1 if options.quick else options.gib) * 2**30)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, group(options.limit_mib << 20) as within:
        folder = Path(temporary)
        settings = prepare(folder, size)
        os.sync()
        took = json.loads(
            limited([sys.executable, __file__, "--child", str(folder), "--workers", str(options.workers)], within)
        )
        shutil.rmtree(run_folder(settings).mixture(1))
        os.sync()
        start = time.perf_counter()
        limited(
            ["bash", "-c", f'cp -r "{run_folder(settings).pools}" "{folder / "copy"}" && sync -f "{folder}"'], within
        )
        copy = time.perf_counter() - start
    figures = {
        "pool_gib": size / 2**30,
        "limit_mib": options.limit_mib if within else None,
        "peak_mib": took["peak_mib"],
        "mib_per_s": size / took["seconds"] / 2**20,
        "cp_mib_per_s": size / copy / 2**20,
        "ratio_cp": copy / took["seconds"],
    }
    for name, value in figures.items():
        print(f"  {name:14} {'none' if value is None else f'{value:10,.2f}'}")
    return end(figures, as_json=options.json)


if __name__ == "__main__":
    run(main)
