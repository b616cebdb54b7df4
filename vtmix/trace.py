"""Where a sample went, and what a step saw: computed from manifests and pools, since order on disk is training order.

A manifest holds its plan, a plan says which stretch of a domain's pool an epoch took, and the arrangement is a function
that can be read in both directions. So there is no ledger, and an epoch of any size is answered alike.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vtmix import mds
from vtmix.artifacts import Manifest, Plan, RunFolder, run_folder
from vtmix.compile import made_from, open_pools
from vtmix.errors import MissingError, MixtureError
from vtmix.plan import Arrangement, arrangement, shard_of
from vtmix.pool import Pool
from vtmix.settings import MixtureConfig


@dataclass(frozen=True)
class Seen:
    """One sample at one place of one epoch; positions and places count from 0, steps from 1."""

    epoch: int
    position: int
    domain: str
    sample_id: str
    shard: str
    place: int
    """Its place within the shard."""
    step: int
    """The step of the epoch whose batch holds it."""
    run_step: int
    """The same step counted over the whole run, as in training/steps.jsonl."""


@dataclass(frozen=True)
class _Epoch:
    """A compiled epoch, read from its manifest."""

    plan: Plan
    layout: mds.Layout
    order: Arrangement
    batch: int

    @property
    def steps(self) -> int:
        return -(-self.plan.samples // self.batch)

    def seen(self, position: int, domain: str, sample_id: str) -> Seen:
        shard, place = shard_of(self.plan, position)
        step = position // self.batch + 1
        return Seen(
            epoch=self.plan.epoch,
            position=position,
            domain=domain,
            sample_id=sample_id,
            shard=self.layout.name(shard),
            place=place,
            step=step,
            run_step=(self.plan.epoch - 1) * self.steps + step,
        )


def of_sample(config: MixtureConfig, sample_id: str) -> list[Seen]:
    """Every place at which a sample stands in the compiled epochs, in training order.

    Raises MissingError when no pool holds the sample, or no epoch is compiled.
    """
    run, pools = run_folder(config), open_pools(config)
    epochs = [_opened(config, Manifest.read(run.manifest(epoch), "")) for epoch in compiled(run)]
    if not epochs:
        raise MissingError(f"{run.path}: no epoch is compiled yet, so no sample was seen")
    places = {name: pool.find(sample_id) for name, pool in pools.items()}
    if all(place is None for place in places.values()):
        raise MissingError(
            f"no pool in {run.pools} holds a sample {sample_id!r}: ids are 32 hex digits, the `sample_id` column of a "
            "pool's parts, and held-out samples are in no pool"
        )
    found = [
        epoch.seen(position, name, sample_id)
        for epoch in epochs
        for name, place in places.items()
        if place is not None
        for position in _positions(epoch, name, place)
    ]
    return sorted(found, key=lambda seen: (seen.epoch, seen.position))


def of_step(config: MixtureConfig, epoch: int, step: int) -> list[Seen]:
    """The samples of one step's batch (steps count from 1 within the epoch), in order.

    Raises MissingError when the epoch is not compiled, MixtureError when it has no such step.
    """
    run, pools = run_folder(config), open_pools(config)
    manifest = Manifest.read(run.manifest(epoch), f"compile it with `python -m vtmix.compile --epoch {epoch}`")
    opened = _opened(config, manifest)
    if not 1 <= step <= opened.steps:
        raise MixtureError(f"epoch {epoch} has the steps 1 to {opened.steps:,}, found {step:,}")
    start = (step - 1) * opened.batch
    stop = min(start + opened.batch, opened.plan.samples)
    domains, ranks = opened.order.stretch(start, stop)
    names = list(opened.plan.domains)
    return [
        opened.seen(position, names[domain], _sample_id(pools, opened.plan, names[domain], rank))
        for position, domain, rank in zip(range(start, stop), domains.tolist(), ranks.tolist(), strict=True)
    ]


def compiled(run: RunFolder) -> Iterator[int]:
    """The epochs that have a manifest, in order."""
    epoch = 1
    while run.plan(epoch).exists():
        if run.manifest(epoch).exists():
            yield epoch
        epoch += 1


def _opened(config: MixtureConfig, manifest: Manifest) -> _Epoch:
    plan, layout = made_from(manifest)
    return _Epoch(plan, layout, arrangement(plan), config.training.batch_size)


def _positions(epoch: _Epoch, name: str, place: int) -> Iterator[int]:
    """Where in an epoch the sample at a place of a domain's pool stands: once per pass."""
    domain = epoch.plan.domains.get(name)
    if domain is None or not domain.count:
        return
    number = list(epoch.plan.domains).index(name)
    first = (place - domain.position) % domain.pool_samples
    for rank in range(first, domain.count, domain.pool_samples):
        yield epoch.order.position(number, rank)


def _sample_id(pools: Mapping[str, Pool], plan: Plan, name: str, rank: int) -> str:
    (table,) = pools[name].window(plan.domains[name].position + rank, 1)
    identity: str = table["sample_id"][0].as_py()
    return identity
