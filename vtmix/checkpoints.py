"""Training checkpoints that survive kills: one folder each, published by one rename, digest checked before it is read.

    checkpoints/step-00000012/state.pt          what the trainer saved
    checkpoints/step-00000012/checkpoint.json   its size and digest, and the step, epoch and mixture it belongs to

There is no pointer to the latest one to go stale: the newest is the highest number. (Composer's own saver writes in
place, its `latest` link is missing for a moment at every save, and a run that finds no link silently starts afresh.)
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vtmix import commit
from vtmix.artifacts import Artefact, Count
from vtmix.errors import ConflictError, DamageError, VtmixError, listing

STATE = "state.pt"
MARKER = "checkpoint.json"


class Checkpoint(Artefact):
    """What a checkpoint says of itself (checkpoints/step-00000012/checkpoint.json)."""

    step: Annotated[Count, Field(description="optimizer steps taken since the base model")]
    epoch: Annotated[int, Field(ge=1, description="the epoch the last step belongs to")]
    mixture: Annotated[str, Field(description="digest of the mixture that epoch trains on")]
    bytes: Count
    sha256: str


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return folder / f"step-{step:08d}"


def staged(folder: Path, step: int) -> Path:
    """The file to save a checkpoint's state to, before it is published; the same name on every rank."""
    return folder / f"{commit.STAGING_PREFIX}{folder_of(folder, step).name}" / STATE


def publish(state: Path, *, step: int, epoch: int, mixture: str, keep: int) -> Path:
    """Makes a staged state visible as the checkpoint after `step` steps, then removes all but the `keep` newest."""
    with state.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    checkpoint = Checkpoint(step=step, epoch=epoch, mixture=mixture, bytes=state.stat().st_size, sha256=digest)
    commit.write_staged(state.with_name(MARKER), checkpoint.text())
    folder = state.parent.parent
    final = folder_of(folder, step)
    commit.publish_folder(state.parent, final)
    for old in _published(folder)[:-keep]:
        commit.remove_folder(old)
    return final


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """The state file of the newest intact checkpoint and what it says of itself; None where nothing was saved yet.

    A damaged checkpoint is reported through `say` and removed once an older one is found to be intact. Raises
    DamageError when checkpoints are there but none is intact: training never starts afresh over them.
    """
    _sweep(folder)
    damaged: dict[Path, str] = {}
    for path in reversed(_published(folder)):
        try:
            found = _open(path)
        except VtmixError as error:
            damaged[path] = str(error)
            continue
        for bad, reason in damaged.items():
            say(f"{reason}: falling back to the checkpoint after step {found.step}")
            commit.remove_folder(bad)
        return path / STATE, found
    if damaged or _foreign(folder):
        raise DamageError(
            f"{folder} holds no intact checkpoint, and training does not start afresh over what is there:\n  "
            f"{listing([*damaged.values(), *_foreign(folder)])}\n"
            f"restore a checkpoint, or move the run folder away to begin again from the base model"
        )
    return None


def epochs(folder: Path) -> list[int]:
    """The epochs that the published checkpoints belong to; their states are not read.

    Raises DamageError when a checkpoint does not say.
    """
    return [Checkpoint.read(path / MARKER, f"{path.name} is not complete").epoch for path in _published(folder)]


def require_mixture(checkpoint: Checkpoint, digest: str) -> None:
    """Raises ConflictError, naming both, when a checkpoint was trained on another mixture than the one of its epoch."""
    if checkpoint.mixture != digest:
        raise ConflictError(
            f"the checkpoint after step {checkpoint.step} was trained on another mixture of epoch {checkpoint.epoch}: "
            f"its digest was {checkpoint.mixture}, the one in the run folder has {digest}: "
            "restore that mixture, or start another run folder"
        )


def _open(path: Path) -> Checkpoint:
    """A checkpoint whose state is complete and holds the bytes that were saved."""
    found = Checkpoint.read(path / MARKER, f"{path.name} is not complete")
    state = path / STATE
    size = state.stat().st_size if state.is_file() else 0
    if size != found.bytes:
        raise DamageError(f"{state} holds {size:,} of {found.bytes:,} bytes")
    with state.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != found.sha256:
        raise DamageError(f"{state} does not hold the bytes that were saved (SHA-256 {digest})")
    if path.name != folder_of(path.parent, found.step).name:
        raise DamageError(f"{path} says it is the checkpoint after step {found.step}")
    return found


def _published(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    names = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")))


def _foreign(folder: Path) -> list[str]:
    """What stands in the folder without being a checkpoint."""
    known = {*_published(folder)}
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f"{path} is no checkpoint" for path in names if path not in known and not path.name.startswith(".")]


def _sweep(folder: Path) -> None:
    """Removes what a killed process left unpublished, or half removed."""
    commit.sweep_removed(folder)
    for path in folder.glob(f"{commit.STAGING_PREFIX}*"):
        shutil.rmtree(path)
