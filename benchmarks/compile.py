"""How fast vtmix compiles a mixture, beside MosaicML's MDSWriter and `cp -r`, in one run.

    python benchmarks/compile.py [--quick] [--json] [--packing 2048]

All three put the same samples into the same shards: vtmix from its pools, MDSWriter from the same samples already
tokenised and in memory, cp from the finished mixture. Every peer starts with its input in the page cache, and ends when
its output is flushed to disk, which vtmix always does before it publishes; `unflushed` leaves that out for all three.
The corpus is benchmarks/shared.py's, the tokenizer is the quickstart's.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from shared import QUICKSTART, corpus, end, run

from vtmix import compile as compiler
from vtmix import config, mds, verify
from vtmix.artifacts import Weights, run_folder
from vtmix.errors import VtmixError
from vtmix.pooling import build
from vtmix.settings import MixtureConfig


def sources() -> dict[str, Path]:
    """The training file of every domain."""
    found = corpus()
    if not found or not (QUICKSTART / "model").is_dir():
        raise VtmixError(f"no corpus or tokenizer found: run `python {QUICKSTART / 'fetch.py'}` first")
    return found


def prepare(folder: Path, samples: int, packing: int | None) -> MixtureConfig:
    """Pools of the corpus and weights by their size, so that every sample appears equally often."""
    domains = {name: {"train": str(path)} for name, path in sources().items()}
    raw: dict[str, Any] = {
        "model": str(QUICKSTART / "model"),
        "domains": domains,
        "samples_per_epoch": samples,
        "mixture": {"packing": packing and {"length": packing}},
        "weights": {"algorithm": "uniform"},
    }
    settings = config.validate(raw, folder / "mixture.yaml")
    pools = build(settings)
    total = sum(pool.samples for pool in pools.values())
    weights = {name: pool.samples / total for name, pool in pools.items()}
    Weights(epoch=1, weights=weights).publish(run_folder(settings).weights(1))
    return settings


def measured_compile(settings: MixtureConfig, workers: int, *, flush: bool) -> tuple[float, float]:
    """Seconds that a fresh process takes to compile the epoch, start-up included, and its peak memory in MiB."""
    command = [sys.executable, __file__, "--child", str(settings.root), "--workers", str(workers)]
    done = subprocess.run([*command, *([] if flush else ["--unflushed"])], check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def child(root: Path, workers: int, *, flush: bool) -> None:
    """Compiles in this process and prints [seconds, peak MiB]."""
    raw = json.loads((root / "mixture.json").read_text())
    settings = config.validate(raw, root / "mixture.yaml")
    start = time.perf_counter()
    with contextlib.nullcontext() if flush else mock.patch("os.fsync"):
        compiler.compile_epoch(settings, 1, workers)
    seconds = time.perf_counter() - start
    # Not getrusage: a child's ru_maxrss begins at what its parent held when it was forked.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([seconds, int(status["VmHWM"].split()[0]) / 1024]))


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


def cp_seconds(source: Path, target: Path, *, flush: bool) -> float:
    """Seconds that `cp -r` takes."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)  # noqa: S607
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
    """One row of figures: vtmix, MDSWriter and cp under the same rule about flushing."""
    final = run_folder(settings).mixture(1)

    def compile_once() -> tuple[float, float]:
        shutil.rmtree(final, ignore_errors=True)
        os.sync()
        return measured_compile(settings, options.workers, flush=flush)

    seconds, peak = best(options.repeat, compile_once)
    size = sum(path.stat().st_size for path in final.iterdir())
    os.sync()
    copy = best(options.repeat, lambda: cp_seconds(final, settings.root / "copy", flush=flush))
    manifest = verify.open_manifest(final)
    share = min(1.0, options.peer_samples / manifest.samples)
    rows = list(some_samples(settings, math.ceil(share * len(mds.Samples(final)))))
    os.sync()
    columns = compiler.layout_of(settings).columns
    peer = mdswriter_seconds(settings.root / "peer", rows, columns, flush=flush) / (share * manifest.samples)
    rate = settings.samples_per_epoch / seconds
    return {
        **({"utilisation": manifest.packing.utilisation} if manifest.packing else {}),
        "ratio_mdswriter": rate * peer,
        "ratio_cp": copy / seconds,
        "samples_per_s": rate,
        "mib_per_s": size / seconds / 2**20,
        "mdswriter_samples_per_s": 1 / peer,
        "cp_mib_per_s": size / copy / 2**20,
        "peak_mib": peak,
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, one repetition")
    parser.add_argument("--samples", type=int, help="samples of the epoch (default: 300000)")
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
    options.samples = options.samples or (30_000 if options.quick else 300_000)
    options.repeat = 1 if options.quick else 3
    options.peer_samples = 10_000 if options.quick else 50_000
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = prepare(Path(folder), options.samples, options.packing)
        (Path(folder) / "mixture.json").write_text(json.dumps(settings.model_dump(mode="json")))
        flushed = compare(settings, options, flush=True)
        unflushed = compare(settings, options, flush=False)
    for title, row in (("flushed to disk", flushed), ("unflushed", unflushed)):
        print(f"\n{title}: {options.samples:,} samples, {options.workers} workers")
        for name, value in row.items():
            print(f"  {name:24} {value:12,.2f}")
    return end({**flushed, "unflushed": unflushed}, as_json=options.json)


if __name__ == "__main__":
    run(main)
