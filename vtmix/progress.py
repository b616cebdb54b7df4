"""Progress on stderr: a bar with an estimate of the time left, or a line now and then where there is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0

Advance = Callable[[int], None]


@contextmanager
def bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Shows how many of `total` units are done; the function it gives is called with how many more are."""
    console = Console(stderr=True)
    if total == 0:
        yield lambda _: None
    elif console.is_terminal:
        with _columns(console, unit) as progress:
            task = progress.add_task(description, total=total)
            yield lambda more: progress.advance(task, more)
    else:
        yield _lines(console, description, total, unit)


def _columns(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _lines(console: Console, description: str, total: int, unit: str) -> Advance:
    start = shown = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, shown
        done += more
        now = time.monotonic()
        if done >= total or now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            left = (now - start) * (total - done) / max(done, 1)
            console.print(
                f"{description}: {done:,}/{total:,} {unit}, {now - start:.0f} s, {left:.0f} s left",
                markup=False,
                emoji=False,
                highlight=False,
            )

    return advance
