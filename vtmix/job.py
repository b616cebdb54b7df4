"""What the Ray jobs have in common: their options, and how they end."""

import argparse
import sys
from collections.abc import Callable, Iterable

from vtmix.config import load
from vtmix.errors import VtmixError
from vtmix.settings import MixtureConfig


def parser(description: str) -> argparse.ArgumentParser:
    """A job's command line, with the options of every job."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--config", help="default: ./mixture.yaml")
    made.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    return made


def run(arguments: argparse.Namespace, work: Callable[[MixtureConfig], Iterable[str]]) -> int:
    """Does the work and prints its lines; a mistake is one message on stderr. Returns the exit code."""
    try:
        lines = list(work(load(arguments.config, arguments.run)))
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines:
        print(line)
    return 0
