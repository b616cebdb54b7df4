"""How weights move: the knowledge distribution, then Algorithm 2 of arXiv 2411.11266. Pure; opens no file.

Symbols as in the paper: P weights on the simplex, l eval loss, l_ref reference loss, γ learnable potential (Eq. 3),
φ forgetting degree (Eq. 4), σ step size.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vtmix.artifacts import DomainLoss, Inputs, Losses, Reference, Weights, WeightTerms
from vtmix.errors import LossError, MixtureError, listing
from vtmix.settings import WeightsSettings

Shares = dict[str, float]
Unit = Literal["nats_per_token", "nats_per_byte"]


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


def normalise(masses: Mapping[str, float]) -> Shares:
    """Shares of a positive total that sum to 1.

    Scaled by the largest first: a sum of subnormals or of huge numbers would lose digits or overflow.
    """
    largest = max(masses.values())
    scaled = {name: mass / largest for name, mass in masses.items()}
    total = math.fsum(scaled.values())
    return {name: mass / total for name, mass in scaled.items()}


def lift(shares: Mapping[str, float], floor: float) -> Shares:
    """Raises every share to at least `floor`; the others give in proportion to their size.

    Raises MixtureError when the floors alone exceed 1.
    """
    if floor * len(shares) > 1 + 1e-12:
        raise MixtureError(f"floor {floor:g} times {len(shares)} domains exceeds 1: lower weights.floor")
    lifted: set[str] = set()
    result = dict(shares)
    while True:
        below = {name for name, share in result.items() if share < floor and name not in lifted}
        if not below:
            return result
        lifted |= below
        rest = {name: shares[name] for name in shares if name not in lifted}
        if not rest:
            return dict.fromkeys(shares, 1 / len(shares))
        room = 1 - floor * len(lifted)
        result = {name: floor for name in shares if name in lifted} | {
            name: share * room for name, share in normalise(rest).items()
        }
        result = {name: result[name] for name in shares}


def initial(algorithm: str, domains: tuple[str, ...], detected: Mapping[str, float] | None, floor: float) -> Shares:
    """The weights before any training: uniform, inverse (1 - P) / Σ(1 - P_i), or the detected P itself.

    Raises MixtureError when the detection speaks of other domains.
    """
    if algorithm == "uniform":
        return dict.fromkeys(domains, 1 / len(domains))
    if detected is None or set(detected) != set(domains):
        found = "no detection" if detected is None else f"a detection of {', '.join(detected)}"
        raise MixtureError(
            f"algorithm '{algorithm}' starts from the knowledge distribution of {', '.join(domains)}, "
            f"found {found}: run `vtmix detect`"
        )
    masses = {name: 1 - detected[name] if algorithm == "inverse" else detected[name] for name in domains}
    if not any(masses.values()):
        masses = dict.fromkeys(domains, 1.0)
    return lift(normalise(masses), floor)


def update(previous: Mapping[str, float], signals: Mapping[str, Signal], sigma: float, floor: float) -> Shares:
    """Algorithm 2: P'_j = P_j (1 + σ γ_j), normalised, then lifted to the floor."""
    return lift(normalise({name: share * factor(signals[name], sigma) for name, share in previous.items()}), floor)


def factor(signal: Signal, sigma: float) -> float:
    """What Algorithm 2 multiplies a weight by: 1 + σγ."""
    return 1 + sigma * signal.potential


def first_weights(
    settings: WeightsSettings,
    domains: tuple[str, ...],
    detected: Shares | None,
    inputs: Inputs,
    knowledge: str | None = None,
) -> Weights:
    """Epoch 1's weights when no update precedes it; `knowledge` says how the detected distribution is known."""
    weights = initial(settings.algorithm, domains, detected, settings.floor)
    return Weights(
        inputs=inputs,
        epoch=1,
        algorithm=settings.algorithm,
        knowledge=knowledge,
        weights=weights,
        terms={name: WeightTerms(weight=weight) for name, weight in weights.items()},
        warnings=tuple(_absorbed(weights)),
    )


def next_weights(
    settings: WeightsSettings,
    previous: Mapping[str, float],
    *,
    losses: Losses,
    losses_before: Losses | None,
    reference: Reference | None,
    inputs: Inputs,
    knowledge: str | None = None,
) -> Weights:
    """The weights for epoch `losses.epoch + 1`, with the arithmetic that led to them and the health of the signals.

    Raises LossError when a loss must not move weights.
    """
    check_losses(losses, tuple(previous))
    unit = unit_of(losses, reference)
    signals = make_signals(losses, losses_before, reference, unit)
    moves = settings.algorithm == "versatune"
    weights = update(previous, signals, settings.sigma, settings.floor) if moves else dict(previous)
    return Weights(
        inputs=inputs,
        epoch=losses.epoch + 1,
        algorithm=settings.algorithm,
        unit=unit,
        knowledge=knowledge,
        weights=weights,
        terms={
            name: WeightTerms(
                weight=weights[name],
                previous=previous[name],
                loss=signal.loss,
                reference_loss=signal.reference,
                potential=signal.potential if signal.reference is not None else None,
                potential_raw=signal.potential_raw,
                previous_loss=signal.previous,
                forgetting=signal.forgetting,
                forgetting_raw=signal.forgetting_raw,
                factor=factor(signal, settings.sigma) if moves else None,
            )
            for name, signal in signals.items()
        },
        warnings=(
            *(_potential_health(signals, unit) if moves else ()),
            *_small_changes(losses, losses_before),
            *_absorbed(weights),
        ),
    )


def unit_of(losses: Losses, reference: Reference | None) -> Unit:
    """Per token when both losses count the same tokens, else per byte."""
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


def make_signals(losses: Losses, before: Losses | None, reference: Reference | None, unit: Unit) -> dict[str, Signal]:
    """Losses of one unit side by side: the eval loss, the reference's, and that of the epoch before."""

    def read(found: Mapping[str, DomainLoss] | None, name: str) -> float | None:
        loss = found.get(name) if found else None
        if loss is None:
            return None
        return loss.per_byte if unit == "nats_per_byte" else loss.per_token

    missing = [name for name in losses.domains if reference and name not in reference.domains]
    if missing:
        raise LossError(
            f"refusing to update weights: no reference loss for {', '.join(missing)}: run `vtmix reference`"
        )
    return {
        name: Signal(
            loss=loss.per_byte if unit == "nats_per_byte" else loss.per_token,
            reference=read(reference.domains if reference else None, name),
            previous=read(before.domains if before else None, name),
        )
        for name, loss in losses.domains.items()
    }


def _potential_health(signals: Mapping[str, Signal], unit: Unit) -> list[str]:
    potentials = [signal.potential for signal in signals.values()]
    found = []
    if all(potential == 0 for potential in potentials):
        found.append("the learnable potential is 0 in every domain: the reference is no better than the model anywhere")
    elif min(potentials) > 0.99:
        found.append("the learnable potential is above 0.99 in every domain: the reference has memorised its data")
    if len(potentials) > 1 and max(potentials) - min(potentials) < 1e-9:
        found.append("the learnable potential is equal in all domains: no weight moves")
    if unit == "nats_per_byte":
        found.append("the reference has another tokenizer than the model: losses are compared per byte")
    return found


def _small_changes(losses: Losses, before: Losses | None) -> list[str]:
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


def _absorbed(weights: Mapping[str, float]) -> list[str]:
    return [
        f"domain '{name}' has weight 0 and a product never leaves it: set weights.floor above 0"
        for name, weight in weights.items()
        if weight == 0
    ]
