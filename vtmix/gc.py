"""Removes mixtures that training has left behind. A removed epoch keeps its manifest, and can be compiled again; of one
in a store, what was fetched from there is removed; and of a compressed one, what a reader has expanded.

Kept are the mixtures of every checkpoint, of the epoch that is being trained, and whatever comes after it. Removal is
one rename out of sight, after the manifest was committed beside the mixture's place: an epoch is there whole, or not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vtmix import checkpoints, commit
from vtmix.artifacts import Manifest, RunFolder, run_folder
from vtmix.settings import MixtureConfig


@dataclass(frozen=True)
class Removable:
    """A mixture that nothing needs any more."""

    epoch: int
    folder: Path
    bytes: int


def collect(config: MixtureConfig, say: Callable[[str], None], *, dry_run: bool = False) -> int:
    """Removes what nothing needs, telling it line by line; returns the bytes that were, or would be, freed.

    Raises LockedError while a compile is at work in the run folder.
    """
    run = run_folder(config)
    if not run.path.is_dir():
        return 0
    freed = 0
    with commit.lock(run.path, "compile"):
        for found in removable(run, config.epochs):
            say(f"epoch {found.epoch}: {found.bytes / 2**20:,.1f} MiB in {found.folder}")
            freed += found.bytes
            if not dry_run:
                commit.publish_file(run.kept_manifest(found.epoch), run.manifest(found.epoch).read_bytes())
                commit.remove_folder(found.folder)
        if not dry_run:
            for parent in (run.mixture(1).parent, run.cache("").parent):
                commit.sweep_removed(parent)
    return freed


def removable(run: RunFolder, epochs: int) -> Iterator[Removable]:
    """The mixtures that no checkpoint and no epoch to come needs, oldest first."""
    needed = set(checkpoints.epochs(run.checkpoints))
    for epoch in range(1, epochs + 1):
        if epoch in needed or not run.losses(epoch).exists() or not run.manifest(epoch).exists():
            continue
        manifest = Manifest.read(run.manifest(epoch), "")
        digest = manifest.digest()
        for folder in (run.mixture(epoch), run.cache(digest), run.expanded(digest)):
            if folder.is_dir():
                yield Removable(epoch, folder, sum(path.stat().st_size for path in folder.iterdir()))
