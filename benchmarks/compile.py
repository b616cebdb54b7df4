"""How fast vtmix compiles a mixture, beside MosaicML's MDSWriter, LitData's optimize, `cp -r` and `zstd`, in one run.

    python benchmarks/compile.py [--quick] [--json] [--packing 2048]

All put the same samples into shards of 64 MiB: vtmix from its pools, MDSWriter and LitData from the same samples
already tokenised and in memory, cp from the finished mixture. Every peer starts with its input in the page cache, and
ends when its output is flushed to disk, which vtmix always does before it publishes; `unflushed` leaves that out.
With compression the peer is the zstd program with two threads and the same level, on the finished shards.

Growth is the time for epochs of 10^4 … 10^7 samples of about 150 bytes, in memory where there is a file system of that
kind: a disk that slows down after a gigabyte would be what is measured. The corpus is benchmarks/shared.py's, the
tokenizer is the quickstart's.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import shared
from shared import QUICKSTART, corpus, end, run

from vtmix import compile as compiler
from vtmix import config, mds, verify
from vtmix.artifacts import Weights, run_folder
from vtmix.errors import VtmixError
from vtmix.pooling import build
from vtmix.settings import MixtureConfig

ZSTD_LEVELS = (1, 2, 3)
MEMORY = Path("/dev/shm")  # noqa: S108


def sources() -> dict[str, Path]:
    """The training file of every domain."""
    found = corpus()
    if not found or not (QUICKSTART / "model").is_dir():
        raise VtmixError(f"no corpus or tokenizer found: run `python {QUICKSTART / 'fetch.py'}` first")
    return found


def prepare(folder: Path, domains: dict[str, Path], samples: int, packing: int | None = None) -> MixtureConfig:
    """Pools of the domains and weights by their size, so that every sample appears equally often."""
    raw: dict[str, Any] = {
        "model": str(QUICKSTART / "model"),
        "domains": {name: {"train": str(path)} for name, path in domains.items()},
        "pool": {"leak": "drop"},
        "samples_per_epoch": samples,
        "mixture": {"packing": packing and {"length": packing}},
        "weights": {"algorithm": "uniform"},
    }
    folder.mkdir(exist_ok=True)
    settings = config.validate(raw, folder / "mixture.yaml")
    pools = build(settings)
    total = sum(pool.samples for pool in pools.values())
    weights = {name: pool.samples / total for name, pool in pools.items()}
    Weights(epoch=1, weights=weights).publish(run_folder(settings).weights(1))
    return settings


def small_sources(folder: Path) -> dict[str, Path]:
    """Three domains of 20,000 records of a few words each."""
    paths = {name: folder / f"{name}.jsonl" for name in ("law", "code", "other")}
    for name, path in paths.items():
        with path.open("w", encoding="utf-8") as file:
            for number in range(20_000):
                file.write(json.dumps({"prompt": f"{name} {number}", "response": f"{number % 97}"}) + "\n")
    return paths


def compiled(settings: MixtureConfig, workers: int, *, flush: bool, **changes: Any) -> dict[str, float]:
    """What a fresh process takes to compile the epoch anew: seconds, and its peak memory in MiB."""
    run = run_folder(settings)
    shutil.rmtree(run.mixture(1), ignore_errors=True)
    shutil.rmtree(run.plan(1).parent, ignore_errors=True)
    raw = settings.model_dump(mode="json")
    raw["mixture"] |= {name: value for name, value in changes.items() if name == "compression"}
    raw |= {name: value for name, value in changes.items() if name != "compression"}
    (settings.root / "mixture.json").write_text(json.dumps(raw))
    os.sync()
    command = [sys.executable, __file__, "--child", str(settings.root), "--workers", str(workers)]
    done = subprocess.run([*command, *([] if flush else ["--unflushed"])], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(root: Path, workers: int, *, flush: bool) -> None:
    """Compiles in this process and prints what it took."""
    settings = config.validate(json.loads((root / "mixture.json").read_text()), root / "mixture.yaml")
    with contextlib.nullcontext() if flush else mock.patch("os.fsync"):
        print(json.dumps(shared.compiled(settings, workers)))


def mdswriter_seconds(folder: Path, samples: list[Any], columns: Mapping[str, str], *, flush: bool) -> float:
    """Seconds MDSWriter takes for samples in memory."""
    from streaming import MDSWriter

    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    with MDSWriter(out=str(folder), columns=dict(columns)) as writer:
        for sample in samples:
            writer.write(sample)
    if flush:
        flush_files(folder)
    return time.perf_counter() - start


def litdata_seconds(folder: Path, samples: list[Any], workers: int, *, flush: bool) -> float:
    """Seconds LitData takes for samples in memory, the start of its workers (about 10 s) left out."""
    from litdata import optimize

    def timed(count: int) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        optimize(
            samples.__getitem__,
            list(range(count)),
            str(folder),
            chunk_bytes="64MB",
            num_workers=workers,
            start_method="fork",
            verbose=False,
        )
        if flush:
            flush_files(folder)
        return time.perf_counter() - start

    few = len(samples) // 100
    return (timed(len(samples)) - timed(few)) * len(samples) / (len(samples) - few)


def cp_seconds(source: Path, target: Path, *, flush: bool) -> float:
    """Seconds that `cp -r` takes."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)  # noqa: S607
    if flush:
        flush_files(target)
    return time.perf_counter() - start


def zstd_seconds(source: Path, target: Path, level: int, *, flush: bool) -> float:
    """Seconds that `zstd -T2` takes for every shard of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shards = sorted(str(path) for path in source.glob("*.mds"))
    start = time.perf_counter()
    command = ["zstd", f"-{level}", "-T2", "--quiet", "--output-dir-flat", str(target), *shards]
    subprocess.run(command, check=True)
    if flush:
        flush_files(target)
    return time.perf_counter() - start


def flush_files(folder: Path) -> None:
    """Flushes every file of a folder to disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def best(repeat: int, measure: Callable[[], Any]) -> Any:
    """The smallest of several measurements: the least disturbed one."""
    return min(measure() for _ in range(repeat))


def some_samples(settings: MixtureConfig, count: int) -> Iterator[Any]:
    """The first samples of the mixture, decoded."""
    found = mds.Samples(run_folder(settings).mixture(1))
    return (found[number] for number in range(min(count, len(found))))


def compare(settings: MixtureConfig, options: argparse.Namespace, *, flush: bool) -> dict[str, float]:
    """One row of figures: vtmix, MDSWriter, LitData and cp under the same rule about flushing."""
    final = run_folder(settings).mixture(1)
    took = min(
        (compiled(settings, options.workers, flush=flush) for _ in range(options.repeat)),
        key=lambda found: found["seconds"],
    )
    size = sum(path.stat().st_size for path in final.iterdir())
    os.sync()
    copy = best(options.repeat, lambda: cp_seconds(final, settings.root / "copy", flush=flush))
    shutil.rmtree(settings.root / "copy")
    manifest = verify.open_manifest(final)
    share = min(1.0, options.peer_samples / manifest.samples)
    rows = list(some_samples(settings, math.ceil(share * len(mds.Samples(final)))))
    os.sync()
    columns = compiler.layout_of(settings).columns
    theirs = share * manifest.samples
    mds_rate = theirs / mdswriter_seconds(settings.root / "peer", rows, columns, flush=flush)
    lit_rate = theirs / litdata_seconds(settings.root / "lit", rows, options.workers, flush=flush)
    rate = settings.samples_per_epoch / took["seconds"]
    return {
        **({"utilisation": manifest.packing.utilisation} if manifest.packing else {}),
        "ratio_mdswriter": rate / mds_rate,
        "ratio_litdata": rate / lit_rate,
        "ratio_cp": copy / took["seconds"],
        "samples_per_s": rate,
        "mib_per_s": size / took["seconds"] / 2**20,
        "mdswriter_samples_per_s": mds_rate,
        "litdata_samples_per_s": lit_rate,
        "cp_mib_per_s": size / copy / 2**20,
        "peak_mib": took["peak_mib"],
    }


def compare_zstd(settings: MixtureConfig, options: argparse.Namespace) -> dict[str, float]:
    """By level: zstd's seconds for the finished shards over vtmix's for compiling them compressed; empty without the
    program. They take turns, so that both meet the same machine.
    """
    if shutil.which("zstd") is None:
        return {}
    compiled(settings, options.workers, flush=True)
    source = settings.root / "raw"
    run_folder(settings).mixture(1).rename(source)
    ratios = {}
    for level in ZSTD_LEVELS:
        took = [
            (
                zstd_seconds(source, settings.root / "peer", level, flush=True),
                compiled(settings, options.workers, flush=True, compression=f"zstd:{level}")["seconds"],
            )
            for _ in range(options.repeat)
        ]
        peer, mine = map(min, zip(*took, strict=True))
        ratios[str(level)] = peer / mine
    shutil.rmtree(source)
    return ratios


def growth(folder: Path, sizes: Sequence[int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds, in the median, and peak memory for epochs of small samples, by their size.

    The sizes take turns, so that all meet the same machine; what is over in less than a second is measured more often.
    """
    settings = prepare(folder, small_sources(folder), sizes[0])
    found: dict[str, list[dict[str, float]]] = {str(size): [] for size in sizes}
    for _ in range(options.repeat):
        for size in sizes:
            for _ in range(1 if size == max(sizes) else options.repeat):
                found[str(size)].append(compiled(settings, options.workers, flush=True, samples_per_epoch=size))
    return {
        size: {
            "seconds": statistics.median(one["seconds"] for one in took),
            "peak_mib": max(one["peak_mib"] for one in took),
        }
        for size, took in found.items()
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, one repetition")
    parser.add_argument("--samples", type=int, help="samples of the epoch (default: 1,000,000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--packing", type=int, help="pack into sequences of so many tokens (MDSWriter gets them packed)"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--unflushed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.workers, flush=not options.unflushed)
        return 0
    options.samples = options.samples or (30_000 if options.quick else 1_000_000)
    options.repeat = 1 if options.quick else 3
    options.peer_samples = 10_000 if options.quick else 50_000
    sizes = (1_000, 10_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = prepare(Path(folder) / "corpus", sources(), options.samples, options.packing)
        flushed = compare(settings, options, flush=True)
        unflushed = compare(settings, options, flush=False)
        zstd = compare_zstd(settings, options)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else options.folder) as folder:
        grown = growth(Path(folder), sizes, options)
    for title, row in (("flushed to disk", flushed), ("unflushed", unflushed)):
        print(f"\n{title}: {options.samples:,} samples, {options.workers} workers")
        for name, value in row.items():
            print(f"  {name:24} {value:12,.2f}")
    for level, ratio in zstd.items():
        print(f"\nzstd level {level}: {ratio:.2f} of zstd -T2")
    print("\nsamples of about 150 bytes, in memory:")
    for size, found in grown.items():
        rate = int(size) / found["seconds"]
        print(f"  {int(size):12,} {found['seconds']:8.2f} s {rate:12,.0f} samples/s {found['peak_mib']:6.0f} MiB")
    figures = {
        **flushed,
        "unflushed": unflushed,
        "ratio_zstd": min(zstd.values(), default=None),
        "ratio_zstd_by_level": zstd,
        "growth": {size: found["seconds"] for size, found in grown.items()},
        "growth_peak_mib": {size: found["peak_mib"] for size, found in grown.items()},
    }
    return end(figures, as_json=options.json)


if __name__ == "__main__":
    run(main)
