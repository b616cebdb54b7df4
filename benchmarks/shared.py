"""What the benchmarks share: the corpus they run on, and how they end."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import vtmix
from vtmix.errors import VtmixError

ROOT = Path(vtmix.__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
CORPUS = ROOT.parent / "shared" / "data"


def corpus(folder: Path = CORPUS) -> dict[str, Path]:
    """The training file of every domain: <folder>/<domain>/train.jsonl where there are any, else the quickstart's."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/train.jsonl"))}
    return found or {path.stem: path for path in sorted((QUICKSTART / "data").glob("*.jsonl"))}


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
