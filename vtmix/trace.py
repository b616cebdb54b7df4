"""Where a sample went, and what a step saw: computed from manifests and pools, since order on disk is training order.

A manifest holds its plan, a plan says which stretch of a domain's pool an epoch took, and the arrangement is a function
that can be read in both directions. So there is no ledger, and an epoch of any size is answered alike; where samples
are packed, the shards asked about are packed again, by their lengths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vtmix import mds
from vtmix.artifacts import Manifest, RunFolder, run_folder
from vtmix.compile import made_from, open_pools
from vtmix.errors import MissingError, MixtureError
from vtmix.plan import shard_of
from vtmix.pool import Pool
from vtmix.settings import MixtureConfig
from vtmix.shards import ShardWriter


@dataclass(frozen=True)
class Seen:
    """One sample at one place of one epoch; places count from 0, steps from 1."""

    epoch: int
    domain: str
    sample_id: str
    shard: str
    row: int
    """Its row of the shard, which packed samples share."""
    step: int
    """The step of the epoch whose batch holds it."""
    run_step: int
    """The same step counted over the whole run, as in training/steps.jsonl."""


class _Epoch:
    """A compiled epoch, read from its manifest."""

    def __init__(self, manifest: Manifest, pools: Mapping[str, Pool], batch: int, steps_before: int) -> None:
        self.plan, self._layout = made_from(manifest)
        self._writer = ShardWriter(self.plan, pools, self._layout)
        self._pools, self._batch, self._steps_before = pools, batch, steps_before
        rows = [file.sequences for file in manifest.files[1:]] if self._layout.packing else None
        self._tasks = self._writer.tasks()
        bounds = [task.stop - task.start for task in self._tasks]
        self._edges = np.cumsum([0, *(bounds if rows is None else map(int, filter(None, rows)))])

    @property
    def steps(self) -> int:
        """The epoch's steps."""
        return -(-int(self._edges[-1]) // self._batch)

    def of_sample(self, name: str, place: int, sample_id: str) -> Iterator[Seen]:
        """Where the sample at a place of a domain's pool stands: once per pass."""
        domain = self.plan.domains.get(name)
        if domain is None or not domain.count:
            return
        number = list(self.plan.domains).index(name)
        first = (place - domain.position) % domain.pool_samples
        for rank in range(first, domain.count, domain.pool_samples):
            shard, within = shard_of(self.plan, self._writer.arrangement.position(number, rank))
            row = int(self._writer.rows(self._tasks[shard])[within])
            yield self._seen(shard, row, name, sample_id)

    def of_step(self, step: int) -> Iterator[Seen]:
        """The samples of one step's batch, in the order of its rows."""
        start, stop = (step - 1) * self._batch, min(step * self._batch, int(self._edges[-1]))
        first, last = (int(np.searchsorted(self._edges, row, side="right")) - 1 for row in (start, stop - 1))
        for shard in range(first, last + 1):
            rows = self._writer.rows(self._tasks[shard])
            wanted = np.flatnonzero((rows >= start - self._edges[shard]) & (rows < stop - self._edges[shard]))
            for place in wanted[np.argsort(rows[wanted], kind="stable")].tolist():
                yield self._at(shard, int(rows[place]), place)

    def _at(self, shard: int, row: int, place: int) -> Seen:
        """The sample at a place of a shard's stretch of the epoch."""
        position = self._tasks[shard].start + place
        (domain,), (rank,) = self._writer.arrangement.stretch(position, position + 1)
        name = list(self.plan.domains)[domain]
        (table,) = self._pools[name].window(self.plan.domains[name].position + int(rank), 1, ["sample_id"])
        return self._seen(shard, row, name, table["sample_id"][0].as_py())

    def _seen(self, shard: int, row: int, name: str, sample_id: str) -> Seen:
        step = (int(self._edges[shard]) + row) // self._batch + 1
        return Seen(
            epoch=self.plan.epoch,
            domain=name,
            sample_id=sample_id,
            shard=self._layout.name(shard),
            row=row,
            step=step,
            run_step=self._steps_before + step,
        )


def of_sample(config: MixtureConfig, sample_id: str) -> list[Seen]:
    """Every place at which a sample stands in the compiled epochs, in training order.

    Raises MissingError when no pool holds the sample, or no epoch is compiled.
    """
    run, pools = run_folder(config), open_pools(config)
    epochs = list(_epochs(config, pools))
    if not epochs:
        raise MissingError(f"{run.path}: no epoch is compiled yet, so no sample was seen")
    places = {name: pool.find(sample_id) for name, pool in pools.items()}
    if all(place is None for place in places.values()):
        raise MissingError(
            f"no pool in {run.pools} holds a sample {sample_id!r}: ids are 32 hex digits, the `sample_id` column of a "
            "pool's parts, and held-out samples are in no pool"
        )
    found = [
        seen
        for epoch in epochs
        for name, place in places.items()
        if place is not None
        for seen in epoch.of_sample(name, place, sample_id)
    ]
    return sorted(found, key=lambda seen: (seen.epoch, mds.shard_number(seen.shard), seen.row))


def of_step(config: MixtureConfig, epoch: int, step: int) -> list[Seen]:
    """The samples of one step's batch (steps count from 1 within the epoch), in order.

    Raises MissingError when the epoch is not compiled, MixtureError when it has no such step.
    """
    run = run_folder(config)
    Manifest.read(run.manifest(epoch), f"compile it with `python -m vtmix.compile --epoch {epoch}`")
    opened = next(found for found in _epochs(config, open_pools(config)) if found.plan.epoch == epoch)
    if not 1 <= step <= opened.steps:
        raise MixtureError(f"epoch {epoch} has the steps 1 to {opened.steps:,}, found {step:,}")
    return list(opened.of_step(step))


def _epochs(config: MixtureConfig, pools: Mapping[str, Pool]) -> Iterator[_Epoch]:
    """The epochs that have a manifest, in order."""
    run, steps = run_folder(config), 0
    for manifest in _manifests(run):
        epoch = _Epoch(manifest, pools, config.training.batch_size, steps)
        steps += epoch.steps
        yield epoch


def _manifests(run: RunFolder) -> Iterator[Manifest]:
    epoch = 1
    while run.plan(epoch).exists():
        if run.manifest(epoch).exists():
            yield Manifest.read(run.manifest(epoch), "")
        epoch += 1
