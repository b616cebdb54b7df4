"""Finds what is damaged in a mixture, and names the file and the samples.

Every file is held against the manifest's sizes and digests, and the index against what vtmix would write for these
shards, so that nothing in it can lead a reader out of the folder. Since a shard follows from the plan and the pools
alone, a damaged one is rebuilt in memory and compared, which tells the samples whose bytes changed.
"""

import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vtmix import compile as compiler
from vtmix import distribute, mds
from vtmix.artifacts import MANIFEST, Manifest, MixtureFile, Plan, fingerprint
from vtmix.errors import DamageError, VtmixError, listing
from vtmix.plan import shard_bounds
from vtmix.pool import Pool
from vtmix.shards import ShardWriter, size_of
from vtmix.stores import Store

EPOCH_PATTERN = re.compile(r"epoch-([0-9]{4,})")


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a mixture, its file names safe to open.

    Raises MissingError when there is none, DamageError when it is not what vtmix writes.
    """
    path = folder / MANIFEST
    named = EPOCH_PATTERN.fullmatch(folder.name)
    epoch = int(named[1]) if named else None
    if path.exists() and not _is_regular(path):
        raise DamageError(f"{path}: is not a regular file")
    return read_manifest(path, epoch)


def read_manifest(path: Path, epoch: int | None) -> Manifest:
    """The manifest in a file, of an epoch where one is given; its file names are safe to open.

    Raises MissingError when there is none, DamageError when it is not what vtmix writes.
    """
    manifest = Manifest.read(path, f"compile it with `python -m vtmix.compile --epoch {epoch or '?'}`")
    odd = list(_contradictions(manifest))
    if epoch is not None and manifest.epoch != epoch:
        odd.append(f"it is the manifest of epoch {manifest.epoch}, which does not belong to epoch {epoch}")
    if odd:
        raise DamageError(f"{path}: {listing(odd)}")
    return manifest


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Where a manifest is none that vtmix writes, or one of its numbers was changed."""
    try:
        plan, layout = compiler.made_from(manifest)
        identity = fingerprint(manifest.inputs)
    except (ValueError, TypeError, KeyError):
        yield "its inputs are not those of a mixture"
        return
    names = [file.name for file in manifest.files]
    expected = [mds.INDEX, *map(layout.name, range(len(names) - 1))]
    for name, wanted in itertools.zip_longest(names, expected):
        if name != wanted:
            yield f"{name!r} is no file of a mixture, or out of order (expected {wanted!r})"
    unpacked = [file.name for file in manifest.files if file.sequences is None]
    if unpacked != ([mds.INDEX] if layout.packing else names):
        yield "its files do not count their sequences as a mixture of these inputs does"
    elif (made := compiler.packing_of(layout, manifest.tokens, manifest.files)) != manifest.packing:
        yield f"it says packing {manifest.packing!r}, which should be {made!r}"
    if identity != manifest.fingerprint_of_inputs:
        yield "its inputs do not have the fingerprint it gives"
    for name in {**plan.domains, **manifest.domains}:
        if _share(manifest, name) != (shares := _planned_share(plan, name)):
            yield f"its share of '{name}' (weight, samples, proportion) is not the planned {shares}"
    for what, stated, total in (
        ("epoch", manifest.epoch, plan.epoch),
        ("samples", manifest.samples, plan.samples),
        ("tokens", manifest.tokens, sum(domain.tokens for domain in manifest.domains.values())),
        ("bytes", manifest.bytes, sum(file.bytes for file in manifest.files[1:])),
        ("files", len(names), plan.shards + 1),
    ):
        if stated != total:
            yield f"it says {what} {stated:,}, which should be {total:,}"


def _share(manifest: Manifest, name: str) -> tuple[float, int, float] | None:
    domain = manifest.domains.get(name)
    return (domain.weight, domain.samples, domain.proportion) if domain else None


def _planned_share(plan: Plan, name: str) -> tuple[float, int, float] | None:
    domain = plan.domains.get(name)
    return (domain.weight, domain.count, domain.count / plan.samples) if domain else None


def damages(folder: Path, manifest: Manifest) -> Iterator[tuple[MixtureFile | None, str]]:
    """Every file that is missing, odd, changed or superfluous, with a sentence about it."""
    expected = {file.name: file for file in manifest.files}
    findings = dict(
        distribute.run(lambda file: (file.name, _check(folder / file.name, file)), manifest.files, backend="threads")
    )
    if findings[mds.INDEX] is None and not _is_index_of(folder / mds.INDEX, manifest):
        findings[mds.INDEX] = f"{folder / mds.INDEX}: is not the index of these shards"
    for name, file in expected.items():
        if finding := findings[name]:
            yield file, finding
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 (names, not paths)
        if name not in expected and name != MANIFEST:
            yield None, f"{folder / name}: is no file of this mixture: remove it"


def _check(path: Path, file: MixtureFile) -> str | None:
    """What is wrong with a file, or None."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path}: is not a regular file"
        if status.st_size != file.bytes:
            return f"{path}: has {status.st_size:,} bytes, expected {file.bytes:,}"
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if digest == file.sha256 else f"{path}: its bytes have changed (digest {digest[:12]}…)"


def _is_index_of(path: Path, manifest: Manifest) -> bool:
    """Whether index.json is what vtmix writes for these shards: no other name, column type or size can stand in it."""
    plan, layout = compiler.made_from(manifest)
    bounds = zip(shard_bounds(plan), manifest.files[1:], strict=True)
    sizes = [size_of(file.sequences or stop - start, file.bytes, file.raw_bytes) for (start, stop), file in bounds]
    return path.read_bytes() == layout.index(sizes)


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


def verify_store(store: Store, manifest: Manifest) -> list[str]:
    """A sentence for every object of a mixture in a store that is missing or has changed."""

    def check(file: MixtureFile) -> str | None:
        found = store.digest(file.name)
        if found is None:
            return f"{store.url}/{file.name}: is missing"
        size, digest = found
        if size != file.bytes:
            return f"{store.url}/{file.name}: has {size:,} bytes, expected {file.bytes:,}"
        return None if digest == file.sha256 else f"{store.url}/{file.name}: its bytes have changed"

    content = store.read(MANIFEST)
    lines = [] if content == manifest.text() else [f"{store.url}/{MANIFEST}: is not the manifest that was written"]
    return lines + [line for line in distribute.run(check, manifest.files, backend="threads") if line]


def verify(folder: Path, pools: Mapping[str, Pool] | None) -> list[str]:
    """A sentence for every damage found in a mixture, with the samples it hit where the pools tell them."""
    manifest = open_manifest(folder)
    lines = []
    for file, finding in damages(folder, manifest):
        lines.append(finding)
        path = folder / file.name if file else None
        if file and path and file.name != mds.INDEX and os.path.lexists(path) and _is_regular(path):
            lines += [f"{path}: {where}" for where in _locate(path, file, manifest, pools)]
    return lines


def _locate(path: Path, file: MixtureFile, manifest: Manifest, pools: Mapping[str, Pool] | None) -> list[str]:
    if pools is None:
        return ["the samples cannot be named without the pools"]
    try:
        plan, layout = compiler.made_from(manifest)
        writer = ShardWriter(plan, pools, layout)
        task = writer.tasks()[manifest.files.index(file) - 1]
        if hashlib.sha256(b"".join(writer.stored(task))).hexdigest() != file.sha256:
            return ["the samples cannot be named, since the pools are not what they were"]
        whole, found = b"".join(writer.content(task)), path.read_bytes()
        if file.raw_bytes is not None:
            try:
                found = layout.expand(found, file.raw_bytes)
            except ValueError:
                return [f"cannot be expanded: all its {task.stop - task.start:,} samples are lost"]
        return _changes(whole, found, layout)
    except (VtmixError, OSError, IndexError) as error:
        return [f"the samples cannot be named: {error}"]


def _changes(expected: bytes, found: bytes, layout: mds.Layout) -> list[str]:
    """The regions of a shard in which bytes changed or are missing."""
    count = int.from_bytes(expected[:4], "little")
    table = 4 + 4 * (count + 1)
    offsets = np.frombuffer(expected, np.uint32, count + 1, offset=4).tolist()
    regions = [("sample count", 0, 4), ("offset table", 4, table), ("header", table, offsets[0])]
    lines = [f"{what} changed" for what, begin, end in regions if expected[begin:end] != found[begin:end]]
    for number, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if expected[begin:end] != found[begin:end]:
            sample = mds.decode_sample(expected[begin:end], layout.columns)
            identity = f"samples {sample['sample_ids']}" if layout.packing else f"sample {sample['sample_id']}"
            lines.append(f"{identity} (number {number} of the shard) changed")
    if len(found) > len(expected):
        lines.append(f"{len(found) - len(expected):,} bytes too many at the end")
    return lines
