"""Maps a function over items: in threads, in processes, or as Ray tasks. Results come as they are ready."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    environment: Mapping[str, str] | None = None,
) -> Iterator[Result]:
    """Yields function(item) for every item, in order of completion, with at most 2 × workers items in flight.

    An exception in one item is raised here as it is; items not yet started are not started, and what is under way is
    waited for (on Ray: cancelled first). `threads` suits functions that release the interpreter lock; `processes` and
    `ray` need a function that can be imported by name. With `ray`, the caller has connected to a cluster, `workers`
    (default: its CPUs) bounds the tasks in flight, and the task of a worker that died is done again, perhaps while the
    first attempt is still under way. `environment` holds further variables of the processes started for this.
    """
    if backend == "ray":
        yield from _run_on_ray(function, items, workers, environment or {})
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
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, spawn, _set_environment, (dict(environment or {}),))
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


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _run_on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None, environment: Mapping[str, str]
) -> Iterator[Result]:
    import ray

    task: Any = ray.remote(function)
    if environment:
        task = task.options(runtime_env={"env_vars": dict(environment)})
    most = 2 * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    rest = iter(items)
    pending = [task.remote(item) for item in islice(rest, most)]
    try:
        while pending:
            done, pending = ray.wait(pending)
            yield ray_result(done[0])
            pending += [task.remote(item) for item in islice(rest, 1)]
    finally:
        if pending:
            for left in pending:
                ray.cancel(left)
            ray.wait(pending, num_returns=len(pending))


def ray_result(task: Any) -> Any:
    """What a Ray task returned; what it raised is raised here as it was there."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
