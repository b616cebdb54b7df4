"""Why each weight moved, in words: an epoch's weights file, told term by term."""

from collections.abc import Iterator

from vtmix.algorithms import named
from vtmix.artifacts import ExpansionCondition, Weights, WeightTerms
from vtmix.settings import WeightsSettings

UNITS = {"nats_per_token": "nats per token", "nats_per_byte": "nats per byte", None: "no losses yet"}


def explain(weights: Weights, settings: WeightsSettings) -> Iterator[str]:
    """Lines about the rule, every domain's terms, the condition of Algorithm 3, caps and floors, and warnings."""
    if weights.inputs is None:
        yield f"epoch {weights.epoch}: written by hand"
    else:
        yield f"epoch {weights.epoch}: {weights.algorithm} ({named(weights.algorithm).summary}), {UNITS[weights.unit]}"
    if weights.knowledge:
        yield f"it began from a knowledge distribution that is {weights.knowledge}"
    for name, weight in weights.weights.items():
        yield from _domain(name, weight, weights.terms.get(name), settings)
    if weights.condition is not None:
        yield from _condition(weights.condition, settings)
    if weights.lifted:
        yield f"the floor of {settings.floor:g} raised {', '.join(weights.lifted)}; the others gave in proportion"
    for warning in weights.warnings:
        yield f"note: {warning}"


def _domain(name: str, weight: float, terms: WeightTerms | None, settings: WeightsSettings) -> Iterator[str]:
    if terms is None or terms.previous is None:
        yield f"{name}: {weight:.4f}"
        return
    yield f"{name}: {terms.previous:.4f} → {weight:.4f} ({weight - terms.previous:+.4f})"
    if terms.loss is not None and terms.reference_loss is not None and terms.potential is not None:
        yield (
            f"  γ = (loss - reference) / loss = ({terms.loss:.4f} - {terms.reference_loss:.4f}) / {terms.loss:.4f}"
            + (_clipped(terms.potential_raw, terms.potential, "the reference is no better than the model"))
        )
    elif terms.loss is not None:
        yield f"  loss {terms.loss:.4f}, no reference loss"
    if terms.factor is not None and terms.potential is not None:
        yield f"  factor 1 + σγ = 1 + {settings.sigma:g} × {terms.potential:.4f} = {terms.factor:.4f}, then normalised"
    if terms.loss is not None and terms.previous_loss is not None and terms.forgetting is not None:
        outcome = _clipped(terms.forgetting_raw, terms.forgetting, "nothing was forgotten")
        before = f"{terms.previous_loss:.4f}"
        yield f"  φ = (loss - before) / before = ({terms.loss:.4f} - {before}) / {before}{outcome}"


def _clipped(raw: float | None, value: float, why: str) -> str:
    return f" = {value:.4f}" if raw is None or raw == value else f" = {raw:.4f}, counts as {value:.4f}: {why}"


def _condition(found: ExpansionCondition, settings: WeightsSettings) -> Iterator[str]:
    sign = "<" if found.holds else "≥"
    yield (
        f"targets {', '.join(found.targets)}: mean φ of the others {found.forgetting:.4f} {sign} "
        f"{found.bound:.4f} = ε × mean γ of the targets (ε = {settings.epsilon:g})"
    )
    if found.gain == 0 and not found.holds and found.bounded:
        yield "  the condition does not hold: Algorithm 2 for all domains"
        return
    why = "the condition holds" if found.holds else "the condition does not hold, and this algorithm does not ask"
    capped = f", capped from δ = {settings.delta:g}" if abs(found.gain - settings.delta) > 1e-12 else " (δ)"
    yield f"  {why}: the targets gain {found.gain:.4f}{capped}, the others share the rest by Algorithm 2"
