"""The errors a user can meet, each saying what was found, where, what was expected and what to do.

VtmixError                  exit code 1: something was refused, and nothing that was committed has changed
├── ConfigError             exit code 2: mixture.yaml, or a command's options, cannot be used
├── RecordError             source records cannot be read or encoded
├── LeakError               a training sample also stands in an eval split
├── MissingError            an artefact that a stage reads does not exist yet
├── ConflictError           an artefact exists that was made from other inputs
├── LockedError             another process is at work in the same place
├── DamageError             a committed file does not hold the bytes its manifest promises
├── MixtureError            weights and pools admit no such mixture
├── LossError               losses that must not move the weights
└── DetectionError          the samples or their classifier do not support an estimate
"""

from collections.abc import Iterable
from typing import NamedTuple


class VtmixError(Exception):
    """Something was refused; the message is written for the reader, one line per offender."""

    exit_code = 1


class ConfigError(VtmixError):
    """mixture.yaml, or a command's options, cannot be used."""

    exit_code = 2


class RecordError(VtmixError):
    """Source records cannot be read or encoded."""


class LeakError(VtmixError):
    """A training sample also stands in an eval split."""


class MissingError(VtmixError):
    """An artefact that a stage reads does not exist yet."""


class ConflictError(VtmixError):
    """An artefact exists that was made from other inputs; committed files never change."""


class LockedError(VtmixError):
    """Another process is at work in the same place."""


class DamageError(VtmixError):
    """A committed file does not hold the bytes its manifest promises."""


class MixtureError(VtmixError):
    """Weights and pools admit no such mixture."""


class LossError(VtmixError):
    """Losses that must not move the weights: not finite, negative, missing, foreign or of another mixture."""


class DetectionError(VtmixError):
    """The samples or their classifier do not support an estimate."""


LISTED = 100
"""Offenders among records that a message names, however many there are."""


class Offenders(NamedTuple):
    """Offenders among records: how many there are, and the first LISTED in words."""

    total: int
    first: tuple[str, ...]


def listing(offenders: Iterable[str], limit: int = 20, *, count: int | None = None) -> str:
    """Joins offenders into lines, the first `limit` in full and the rest as a count.

    `count` says how many there are where only the first of them are given.
    """
    lines = list(offenders)
    shown = lines[:limit]
    more = (len(lines) if count is None else count) - len(shown)
    if more > 0:
        shown.append(f"… and {more:,} more")
    return "\n  ".join(shown)
