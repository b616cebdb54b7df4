"""Maps a function over items: in threads, in processes, or as Ray tasks. Results come as they are ready."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Backend = Literal["threads", "processes", "ray"]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    backend: Backend = "processes",
    workers: int | None = None,
) -> Iterator[Result]:
    """Yields function(item) for every item, in order of completion, with at most 2 × workers items in flight.

    An exception in one item is raised here, and items not yet started are not started. `threads` suits functions that
    release the interpreter lock; `processes` and `ray` need a function that can be imported by name. With `ray`, the
    caller has connected to a cluster, and `workers` (default: its CPUs) bounds the tasks in flight.
    """
    if backend == "ray":
        yield from _run_on_ray(function, items, workers)
        return
    workers = workers or cores()
    if backend == "processes" and workers == 1:
        yield from map(function, items)
        return
    executor: Executor
    if backend == "threads":
        executor = ThreadPoolExecutor(workers)
    else:
        # Not fork: a child forked while Arrow's or a tokenizer's threads hold a lock would wait for it for ever.
        executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from _bounded(executor, function, items, 2 * workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _bounded(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    rest = iter(items)
    pending: set[Future[Result]] = {executor.submit(function, item) for item in islice(rest, most)}
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
        pending |= {executor.submit(function, item) for item in islice(rest, len(done))}


def _run_on_ray(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None) -> Iterator[Result]:
    import ray

    task: Any = ray.remote(function)
    most = 2 * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    rest = iter(items)
    pending = [task.remote(item) for item in islice(rest, most)]
    while pending:
        done, pending = ray.wait(pending)
        yield ray.get(done[0])
        pending += [task.remote(item) for item in islice(rest, 1)]
