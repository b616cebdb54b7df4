"""What losses say of a domain: learnable potential γ (Eq. 3), forgetting degree φ (Eq. 4), and whether to believe them.

Pure; opens no file. Losses of two tokenizers are compared per byte, else per token.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from vtmix.artifacts import DomainLoss, Losses, Reference
from vtmix.errors import LossError, listing
from vtmix.settings import LossUnit


@dataclass(frozen=True)
class Signal:
    """A domain's losses in one unit, and the signals they give. A missing loss is None."""

    loss: float
    reference: float | None = None
    previous: float | None = None

    @property
    def potential_raw(self) -> float | None:
        """γ before clipping: (l - l_ref) / l."""
        return None if self.reference is None else _relative(self.loss - self.reference, self.loss)

    @property
    def potential(self) -> float:
        """γ = max((l - l_ref) / l, 0)."""
        return max(self.potential_raw or 0.0, 0.0)

    @property
    def forgetting_raw(self) -> float | None:
        """φ before clipping: (l(t) - l(t-1)) / l(t-1)."""
        return None if self.previous is None else _relative(self.loss - self.previous, self.previous)

    @property
    def forgetting(self) -> float:
        """φ = max((l(t) - l(t-1)) / l(t-1), 0); 0 without a previous loss."""
        return max(self.forgetting_raw or 0.0, 0.0)


def _relative(difference: float, whole: float) -> float:
    """A quotient kept within the finite floats, which JSON can hold; 0 / 0 is 0."""
    if difference == 0:
        return 0.0
    largest = sys.float_info.max
    if whole == 0:
        return math.copysign(largest, difference)
    return max(-largest, min(largest, difference / whole))


def unit_of(losses: Losses, reference: Reference | None) -> LossUnit:
    """That of reference losses given as numbers; else per token when both losses count the same tokens, or per byte."""
    if reference is not None and reference.unit is not None:
        return reference.unit
    same = reference is None or reference.tokenizer == losses.tokenizer
    return "nats_per_token" if same else "nats_per_byte"


def check_losses(losses: Losses, domains: tuple[str, ...]) -> None:
    """Raises LossError listing every loss that must not move weights: missing, foreign, not finite, negative, empty."""
    where = f"at epoch {losses.epoch}"
    offenders = [f"eval loss of '{name}' is missing {where}" for name in domains if name not in losses.domains]
    for name, loss in losses.domains.items():
        if name not in domains:
            offenders.append(f"'{name}' has an eval loss {where} but is no domain of this run")
        elif loss.tokens == 0 or loss.bytes == 0:
            offenders.append(f"eval loss of '{name}' was taken over {loss.tokens} tokens, {loss.bytes} bytes {where}")
        elif not math.isfinite(loss.nats):
            offenders.append(f"eval loss of '{name}' is {loss.nats} {where}")
        elif loss.nats < 0:
            offenders.append(f"eval loss of '{name}' is negative ({loss.nats:g} nats) {where}")
        elif loss.standard_error is not None and not math.isfinite(loss.standard_error):
            offenders.append(f"standard error of the loss of '{name}' is {loss.standard_error} {where}")
    if offenders:
        raise LossError(f"refusing to update weights: {listing(offenders)}")


def make_signals(
    losses: Losses, before: Losses | None, reference: Reference | None, unit: LossUnit
) -> dict[str, Signal]:
    """Losses of one unit side by side: the eval loss, the reference's, and that of the epoch before."""

    def read(found: Mapping[str, DomainLoss] | None, name: str) -> float | None:
        loss = found.get(name) if found else None
        return None if loss is None else loss.per(unit)

    missing = [name for name in losses.domains if reference and name not in reference.domains]
    if missing:
        raise LossError(
            f"refusing to update weights: no reference loss for {', '.join(missing)}: run `vtmix reference`"
        )
    return {
        name: Signal(
            loss=loss.per(unit),
            reference=read(reference.domains if reference else None, name),
            previous=read(before.domains if before else None, name),
        )
        for name, loss in losses.domains.items()
    }


def potential_health(signals: Mapping[str, Signal], unit: LossUnit) -> list[str]:
    """What keeps the learnable potential from saying anything, in words."""
    potentials = [signal.potential for signal in signals.values()]
    found = []
    if all(potential == 0 for potential in potentials):
        found.append("the learnable potential is 0 in every domain: the reference is no better than the model anywhere")
    elif min(potentials) > 0.99:
        found.append("the learnable potential is above 0.99 in every domain: the reference has memorised its data")
    if len(potentials) > 1 and max(potentials) - min(potentials) < 1e-9:
        found.append("the learnable potential is equal in all domains: no weight moves")
    if unit == "nats_per_byte":
        found.append("losses are compared per byte: the reference has another tokenizer, or its losses were given so")
    return found


def small_changes(losses: Losses, before: Losses | None) -> list[str]:
    """Changes of loss that sampling noise alone explains."""
    found = []
    for name, loss in losses.domains.items():
        old = before.domains.get(name) if before else None
        if old is None or loss.standard_error is None:
            continue
        change = loss.per_token - old.per_token
        if abs(change) < loss.standard_error:
            found.append(
                f"the loss of '{name}' changed by {change:+.4f}, less than its standard error {loss.standard_error:.4f}"
            )
    return found
