"""An epoch's weights, with the arithmetic that led to them (weights/epoch-000N.json). Pure; opens no file."""

from collections.abc import Mapping

from vtmix import algorithms
from vtmix.algorithms import Algorithm, Situation
from vtmix.artifacts import ExpansionCondition, Inputs, Losses, Weights, WeightTerms
from vtmix.settings import LossUnit
from vtmix.signals import potential_health, small_changes
from vtmix.simplex import lift


def make_weights(
    situation: Situation,
    inputs: Inputs,
    *,
    unit: LossUnit | None = None,
    losses: Losses | None = None,
    losses_before: Losses | None = None,
    knowledge: str | None = None,
) -> Weights:
    """What an algorithm makes of a situation; without a history, the weights before any training.

    `losses` are those its signals were made from, `knowledge` says how the detected distribution is known. Raises
    MixtureError when the algorithm lacks what it starts from.
    """
    algorithm, floor = algorithms.named(situation.settings.algorithm), situation.settings.floor
    shares = algorithm.rule(situation)
    weights = lift(shares, floor)
    return Weights(
        inputs=inputs,
        epoch=situation.epoch,
        algorithm=algorithm.name,
        unit=unit,
        knowledge=knowledge,
        weights=weights,
        terms={name: _terms(name, weights, situation, algorithm) for name in weights},
        condition=_condition(situation, algorithm),
        lifted=tuple(name for name, share in shares.items() if share < floor),
        warnings=(
            *(potential_health(situation.signals, unit) if algorithm.refers and situation.signals and unit else ()),
            *(small_changes(losses, losses_before) if losses else ()),
            *_absorbed(weights, algorithm),
        ),
    )


def _terms(name: str, weights: Mapping[str, float], situation: Situation, algorithm: Algorithm) -> WeightTerms:
    signal = situation.signals.get(name)
    if signal is None or situation.previous is None:
        return WeightTerms(weight=weights[name])
    return WeightTerms(
        weight=weights[name],
        previous=situation.previous[name],
        loss=signal.loss,
        reference_loss=signal.reference,
        potential=signal.potential if signal.reference is not None else None,
        potential_raw=signal.potential_raw,
        previous_loss=signal.previous,
        forgetting=signal.forgetting,
        forgetting_raw=signal.forgetting_raw,
        factor=algorithms.factor(signal, situation.settings.sigma) if algorithm.scales else None,
    )


def _condition(situation: Situation, algorithm: Algorithm) -> ExpansionCondition | None:
    if not (algorithm.expands and algorithm.moves and situation.history):
        return None
    found = algorithms.condition(situation)
    gains = found.holds or not algorithm.bounded
    before = sum((situation.previous or {})[name] for name in situation.targets)
    return ExpansionCondition(
        targets=situation.targets,
        forgetting=found.forgetting,
        bound=found.bound,
        holds=found.holds,
        bounded=algorithm.bounded,
        gain=algorithms.gained(situation) - before if gains else 0.0,
    )


def _absorbed(weights: Mapping[str, float], algorithm: Algorithm) -> list[str]:
    if not algorithm.moves:
        return []
    return [
        f"domain '{name}' has weight 0 and a product never leaves it: set weights.floor above 0"
        for name, weight in weights.items()
        if weight == 0
    ]
