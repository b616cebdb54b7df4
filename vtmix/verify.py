"""Finds what is damaged in a mixture, and names the file and the samples.

Every file is held against the manifest's sizes and digests. Since a shard follows from the plan and the pools alone, a
damaged one is rebuilt in memory and compared, which tells the samples whose bytes changed.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vtmix import compile as compiler
from vtmix import distribute
from vtmix.artifacts import Manifest, MixtureFile, Plan
from vtmix.errors import DamageError, VtmixError, listing
from vtmix.pool import Pool
from vtmix.shards import ShardWriter

FILE_PATTERN = re.compile(r"(shard\.\d{5,}\.mds|index\.json)")


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a mixture, its file names safe to open.

    Raises MissingError when there is none, DamageError when it is not what vtmix writes.
    """
    epoch = folder.name.removeprefix("epoch-").lstrip("0") or "?"
    manifest = Manifest.read(folder / compiler.MANIFEST, f"compile it with `python -m vtmix.compile --epoch {epoch}`")
    names = [file.name for file in manifest.files]
    odd = [f"{name!r} is no file of a mixture" for name in names if not FILE_PATTERN.fullmatch(name)]
    if len(set(names)) < len(names):
        odd.append("a file is listed twice")
    if odd:
        raise DamageError(f"{folder / compiler.MANIFEST}: {listing(odd)}")
    return manifest


def damages(folder: Path, manifest: Manifest) -> Iterator[tuple[MixtureFile | None, str]]:
    """Every file that is missing, odd, changed or superfluous, with a sentence about it."""
    expected = {file.name: file for file in manifest.files}
    findings = distribute.run(lambda file: (file, _check(folder / file.name, file)), manifest.files, backend="threads")
    for file, finding in sorted(findings, key=lambda item: item[0].name):
        if finding:
            yield file, finding
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 (names, not paths)
        if name not in expected and name != compiler.MANIFEST:
            yield None, f"{folder / name}: is no file of this mixture: remove it"


def _check(path: Path, file: MixtureFile) -> str | None:
    """What is wrong with a file, or None."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return f"{path}: is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: is not a regular file"
    if status.st_size != file.bytes:
        return f"{path}: has {status.st_size:,} bytes, expected {file.bytes:,}"
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if digest == file.sha256 else f"{path}: its bytes have changed (digest {digest[:12]}…)"


def require_intact(folder: Path) -> Manifest:
    """The manifest of a mixture whose every byte is as it was written.

    Raises MissingError when there is no mixture, DamageError naming the files that changed.
    """
    manifest = open_manifest(folder)
    found = [finding for _, finding in damages(folder, manifest)]
    if found:
        raise DamageError(
            f"the mixture is damaged:\n  {listing(found)}\nmove {folder} away and compile the epoch again"
        )
    return manifest


def verify(folder: Path, plan: Plan | None, pools: Mapping[str, Pool] | None) -> list[str]:
    """A sentence for every damage found in a mixture, with the samples it hit where plan and pools tell them."""
    manifest = open_manifest(folder)
    lines = []
    for file, finding in damages(folder, manifest):
        lines.append(finding)
        if file is not None and file.name.endswith(".mds") and (folder / file.name).is_file():
            lines += [f"{folder / file.name}: {where}" for where in _locate(folder, file, manifest, plan, pools)]
    return lines


def _locate(
    folder: Path, file: MixtureFile, manifest: Manifest, plan: Plan | None, pools: Mapping[str, Pool] | None
) -> list[str]:
    if plan is None or pools is None or manifest.inputs is None:
        return ["the samples cannot be named without the plan and the pools"]
    try:
        writer = ShardWriter(plan, pools, manifest.inputs["shard_bytes"])
        task = writer.tasks()[int(file.name.split(".")[1])]
        whole = b"".join(writer.content(task))
    except VtmixError as error:
        return [f"the samples cannot be named: {error}"]
    if hashlib.sha256(whole).hexdigest() != file.sha256:
        return ["the samples cannot be named, since the pools are not what they were"]
    return _changes(whole, (folder / file.name).read_bytes(), writer.sample_ids(task))


def _changes(expected: bytes, found: bytes, sample_ids: list[str]) -> list[str]:
    """The regions of a shard in which bytes changed or are missing."""
    shared = min(len(expected), len(found))
    same = np.frombuffer(expected, np.uint8, shared) == np.frombuffer(found, np.uint8, shared)
    changed = np.concatenate([np.flatnonzero(~same), np.arange(shared, len(expected))])
    offsets = np.frombuffer(expected, np.uint32, len(sample_ids) + 1, offset=4).astype(np.int64)
    table = 4 + 4 * (len(sample_ids) + 1)
    lines = []
    if (changed < 4).any() or ((changed >= table) & (changed < offsets[0])).any():
        lines.append("header changed")
    if ((changed >= 4) & (changed < table)).any():
        lines.append("offset table changed")
    hit = np.unique(np.searchsorted(offsets, changed[changed >= offsets[0]], side="right") - 1)
    lines += [f"sample {sample_ids[number]} (number {number} of the shard) changed" for number in hit.tolist()]
    if len(found) > len(expected):
        lines.append(f"{len(found) - len(expected):,} bytes too many at the end")
    return lines
