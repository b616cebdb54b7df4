"""What the benchmarks share: the corpus they run on, and how they end."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import vtmix
from vtmix.compile import compile_epoch
from vtmix.errors import VtmixError
from vtmix.settings import MixtureConfig

ROOT = Path(vtmix.__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
CORPUS = ROOT.parent / "shared" / "data"


def corpus(folder: Path = CORPUS) -> dict[str, Path]:
    """The training file of every domain: <folder>/<domain>/train.jsonl where there are any, else the quickstart's."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/train.jsonl"))}
    return found or {path.stem: path for path in sorted((QUICKSTART / "data").glob("*.jsonl"))}


def compiled(settings: MixtureConfig, workers: int) -> dict[str, float]:
    """What compiling epoch 1 takes in this process: seconds, and the process's peak memory in MiB."""
    start = time.perf_counter()
    compile_epoch(settings, 1, workers)
    seconds = time.perf_counter() - start
    # Not getrusage: a child's ru_maxrss begins at what its parent held when it was forked.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"seconds": seconds, "peak_mib": int(status["VmHWM"].split()[0]) / 1024}


def end(figures: Mapping[str, Any], *, as_json: bool) -> int:
    """Prints the figures as one object on the last line, where that was asked for; returns the exit code."""
    if as_json:
        print(json.dumps(figures))
    return 0


def run(main: Callable[[], int]) -> None:
    """Ends the process with a benchmark's exit code; what cannot be run is one line."""
    try:
        sys.exit(main())
    except VtmixError as error:
        sys.exit(f"error: {error}")
