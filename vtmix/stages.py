"""The Ray Data pipeline of a detection: generate (actors) → classify (actors) → one Parquet part per block.

Both stages are pools of actors that stay busy at the same time. What an actor works with is built inside it, from a
small description that travels there; a stage that runs in an environment of its own is started by that environment's
interpreter.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from vtmix import background, cluster
from vtmix.classify import Classifier, Matrix, sound
from vtmix.cluster import Reserved
from vtmix.distribute import cores
from vtmix.errors import DetectionError
from vtmix.generate import Openings
from vtmix.samples import Block, Parts, Sample
from vtmix.settings import Resources

Sampler = Callable[[Sequence[int], Openings], list[Sample]]
"""The seeds of one whole block, and what its samples are to continue → its samples, in order."""

Worker = TypeVar("Worker")

TEXTS_PER_ROW = 64

SPINS = {"GOMP_SPINCOUNT": "300000"}
"""The environment of a model that has the cores to itself: its OpenMP threads watch for work before they sleep.

As long as OpenMP lets them by default, where elsewhere in vtmix they sleep at once. A thread that slept is late for
each of the hundreds of loops in a step: on two cores, watching makes vLLM a quarter faster, and half as fast
beside a busy neighbour.
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: how its worker is made, inside an actor; the interpreter that runs it (None: this one's)."""

    make: Callable[[], Any]
    resources: Resources
    device: str | None = None
    """Where its model computes (auto: on GPUs where there are any); None: it has no model."""
    spread: int = 1
    """The GPUs that one model is spread over."""
    python: Path | None = None

    @property
    def gpus(self) -> float:
        """GPUs per actor; needs a connected cluster."""
        return cluster.gpus_for(self.resources, self.device, self.spread)

    @property
    def reserved(self) -> list[Reserved]:
        """What each of its actors reserves; needs a connected cluster."""
        return [Reserved(self.resources.cpus, self.gpus)] * self.resources.actors

    @property
    def _threads(self) -> int | None:
        """Threads for a model, which wants all it can have."""
        return None if self.device is None else max(1, cores() // self.resources.actors)

    def mapped(self, rows: Any, actor: type, parts: Parts | None = None, *, alone: bool = True) -> Any:
        """A Ray dataset of which every row goes through an actor of this stage; alone: no other stage has a model."""
        import ray.data

        environment: dict[str, Any] = {"py_executable": str(self.python)} if self.python else {}
        if alone and self.device is not None and not SPINS.keys() & os.environ.keys():
            environment["env_vars"] = SPINS
        return rows.map(
            actor,
            fn_constructor_args=(parts, functools.partial(_made, self.make, self._threads)),
            compute=ray.data.ActorPoolStrategy(size=self.resources.actors),
            num_cpus=self.resources.cpus,
            num_gpus=self.gpus,
            runtime_env=environment,
        )


def _made(make: Callable[[], Any], threads: int | None) -> Any:
    """A stage's worker, in its actor."""
    if threads is not None:
        import torch

        # Ray gives an actor as many threads as it reserves CPUs; together they should use all the cores there are.
        torch.set_num_threads(max(torch.get_num_threads(), threads))
    return make()


class Drawn(NamedTuple):
    """A block's Parquet file, and the seconds each stage took for it."""

    block: Block
    part: bytes
    tokens: int
    generating: float
    classifying: float


def draw(
    parts: Parts, blocks: Mapping[Block, Openings], generating: Stage, classifying: Stage
) -> Generator[Drawn, None, None]:
    """Generates and classifies blocks, each with what its samples are to continue; yields them in any order.

    Needs a connected cluster. Raises ConfigError when the stages reserve more than it has, DetectionError when a
    worker gives up.
    """
    cluster.require_resources(generating.reserved + classifying.reserved)
    rows = _rows([{"block": list(block), "openings": json.dumps(found)} for block, found in blocks.items()])
    alone = generating.device is None or classifying.device is None
    files = classifying.mapped(generating.mapped(rows, _Generate, parts, alone=alone), _Classify, parts, alone=alone)
    for row in _results(files):
        yield Drawn(Block(*row["block"]), row["part"], row["tokens"], row["generating"], row["classifying"])


def judge(texts: Mapping[str, Sequence[str]], classifying: Stage) -> Iterator[tuple[str, int, Matrix]]:
    """Classifies labelled texts; yields (domain, place of the first text, probabilities), in any order."""
    cluster.require_resources(classifying.reserved)
    rows = _rows(
        [
            {"domain": domain, "start": start, "texts": list(found[start : start + TEXTS_PER_ROW])}
            for domain, found in texts.items()
            for start in range(0, len(found), TEXTS_PER_ROW)
        ]
    )
    for row in _results(classifying.mapped(rows, _Judge)):
        yield row["domain"], row["start"], np.array(json.loads(row["judged"]))


def _rows(items: list[dict[str, Any]]) -> Any:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say is raised as well
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    rows.context.enable_progress_bars = False
    # Shares of memory, weighed anew ten times a second, for rows that are small: half of what the driver computes.
    rows.context.op_resource_reservation_enabled = False
    background.give_way(rows.context)
    return rows


def _results(dataset: Any) -> Iterator[dict[str, Any]]:
    import ray

    try:
        # Without prefetching: that would hold each row back until the next one is ready.
        for table in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            yield from table.to_pylist()
    except ray.exceptions.RayError as error:
        raise _explained(error) from error


class _Actor(Generic[Worker]):
    """An actor of a stage, and what it works with."""

    def __init__(self, parts: Parts | None, make: Callable[[], Worker]) -> None:
        self._parts = parts
        self._make = make

    # Not in __init__: an actor that cannot be made is reported by Ray with every frame of its own code.
    @functools.cached_property
    def _work(self) -> Worker:
        return self._make()


class _Generate(_Actor[Sampler]):
    """A block → its samples."""

    _parts: Parts

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        generate = self._work
        start = time.perf_counter()
        samples = generate(self._parts.seeds(Block(*row["block"])), json.loads(row["openings"]))
        return {
            "block": row["block"],
            "samples": json.dumps([dataclasses.astuple(sample) for sample in samples]),
            "generating": time.perf_counter() - start,
        }


class _Classify(_Actor[Classifier]):
    """A block's samples → its Parquet file."""

    _parts: Parts

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        classify = self._work
        start = time.perf_counter()
        samples = [Sample(text, tuple(ids), reason) for text, ids, reason in json.loads(row["samples"])]
        judged = sound(classify([sample.text for sample in samples]))
        return {
            "block": row["block"],
            "part": self._parts.encode(Block(*row["block"]), samples, judged),
            "tokens": sum(len(sample.token_ids) for sample in samples),
            "generating": row["generating"],
            "classifying": time.perf_counter() - start,
        }


class _Judge(_Actor[Classifier]):
    """Labelled texts → their probabilities."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        judged = sound(self._work(list(row["texts"])))
        return {"domain": row["domain"], "start": row["start"], "judged": json.dumps(judged.tolist())}


def _explained(error: Exception) -> DetectionError:
    """What stopped the pipeline, in one line: the worker's own error, which Ray carries as text within its frames."""
    own = str(error).partition("\n\nThe above exception")[0].strip()
    reason = re.sub(r"^vtmix\.errors\.\w+: ", "", own.splitlines()[-1]).strip() if own else type(error).__name__
    return DetectionError(f"sampling stopped: {reason}: what is committed is kept, a rerun goes on from there")
