"""The rules that move weights, by name: VersaTune's (arXiv 2411.11266), its baselines and its rivals. Pure.

A rule is a function of a Situation: what is known when an epoch's weights are to be found. It gives shares that sum
to 1; a floor is laid under them afterwards. Symbols as in the paper: P weights, γ learnable potential, φ forgetting
degree, σ step size, E the target domains, δ what they gain, ε how much forgetting they may cost.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vtmix.errors import ConfigError, MixtureError
from vtmix.settings import WeightsSettings
from vtmix.signals import Signal
from vtmix.simplex import Shares, lift, normalise

MEMORY = 0.9
"""Of the moving average of rewards in `odm` (Albalak et al. 2023)."""
LARGEST = 1e300
"""Where a quotient is cut, so that sums of a few stay finite."""


@dataclass(frozen=True)
class Trained:
    """An epoch that is done: the weights it was trained with, and the signals of its losses."""

    weights: Mapping[str, float]
    signals: Mapping[str, Signal]


@dataclass(frozen=True)
class Situation:
    """What is known when an epoch's weights are to be found."""

    epoch: int
    domains: tuple[str, ...]
    settings: WeightsSettings
    knowledge: Mapping[str, float] | None = None
    """The detected distribution over the domains, where there is one."""
    sizes: Mapping[str, int] | None = None
    """Samples in each domain's pool."""
    history: tuple[Trained, ...] = ()
    """What was trained, oldest first. Empty before the first update."""

    @property
    def previous(self) -> Mapping[str, float] | None:
        """The weights of the epoch before."""
        return self.history[-1].weights if self.history else None

    @property
    def signals(self) -> Mapping[str, Signal]:
        """The signals of the epoch before."""
        return self.history[-1].signals if self.history else {}

    @property
    def targets(self) -> tuple[str, ...]:
        """E, in the domains' order."""
        return tuple(name for name in self.domains if name in self.settings.targets)

    @property
    def others(self) -> tuple[str, ...]:
        """The domains outside E."""
        return tuple(name for name in self.domains if name not in self.settings.targets)


Rule = Callable[[Situation], Shares]


@dataclass(frozen=True)
class Algorithm:
    """A rule, and what has to be there before it can be asked."""

    name: str
    rule: Rule
    summary: str
    detects: bool = False
    """It starts from the knowledge distribution."""
    sized: bool = False
    """It goes by the sizes of the pools."""
    refers: bool = False
    """It compares losses with the reference losses."""
    moves: bool = False
    """Its weights follow the losses."""
    scales: bool = False
    """It multiplies weights by 1 + σγ, as Algorithm 2 does."""
    expands: bool = False
    """It has target domains."""
    bounded: bool = True
    """Where it has target domains, they gain only while the condition of Algorithm 3 holds."""

    @property
    def own(self) -> bool:
        """Whether it is a rule of the user's own, which may look at whatever there is."""
        return ":" in self.name


@dataclass(frozen=True)
class Condition:
    """Line 8 of Algorithm 3: the others' mean forgetting degree must stay below ε times the targets' mean potential."""

    forgetting: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the targets gain."""
        return self.forgetting < self.bound


def uniform(situation: Situation) -> Shares:
    """1 / k."""
    return dict.fromkeys(situation.domains, 1 / len(situation.domains))


def inverse(situation: Situation) -> Shares:
    """(1 - P) / Σ(1 - P_i) of the detected P, as in the authors' code."""
    known = _known(situation)
    masses = {name: 1 - known[name] for name in situation.domains}
    return normalise(masses) if any(masses.values()) else uniform(situation)


def constant(situation: Situation) -> Shares:
    """The detected P, never updated."""
    return _known(situation)


def versatune(situation: Situation) -> Shares:
    """Algorithm 2: P'_j = P_j (1 + σ γ_j), normalised. It begins at the detected P."""
    if situation.previous is None:
        return _known(situation)
    return normalise(_scaled(situation))


def versatune_expand(situation: Situation) -> Shares:
    """Algorithm 3: where the condition holds, the targets gain δ and the others share the rest by Algorithm 2."""
    if situation.previous is None:
        return _known(situation)
    return _gained(situation) if condition(situation).holds else versatune(situation)


def expand_unbounded(situation: Situation) -> Shares:
    """Algorithm 3 without its condition: the ablation of the paper's Fig. 7."""
    return _known(situation) if situation.previous is None else _gained(situation)


def expand_uniform(situation: Situation) -> Shares:
    """The targets' share as in Algorithm 3, the rest alike."""
    shares = versatune_expand(situation)
    rest = 1 - math.fsum(shares[name] for name in situation.targets)
    return {name: shares[name] if name in situation.targets else rest / len(situation.others) for name in shares}


def single_domain(situation: Situation) -> Shares:
    """All weight on the target, or the targets alike."""
    return {name: (name in situation.targets) / len(situation.targets) for name in situation.domains}


def natural(situation: Situation) -> Shares:
    """In proportion to the samples there are."""
    return normalise({name: float(size) for name, size in _sizes(situation).items()})


def temperature(situation: Situation) -> Shares:
    """natural ** (1 / τ), normalised: τ = 1 is natural, large τ uniform."""
    power = 1 / situation.settings.temperature
    return normalise({name: share**power for name, share in natural(situation).items()})


def doremi(situation: Situation) -> Shares:
    """Exponentiated gradient on the excess loss clipped at 0 (Xie et al. 2023), once per epoch, from uniform on.

    P'_j = P_j exp(η max(l_j - l_ref_j, 0)), normalised, then smoothed towards uniform.
    """
    if situation.previous is None:
        return uniform(situation)
    settings = situation.settings
    excess = {name: max(found.loss - (found.reference or 0.0), 0.0) for name, found in situation.signals.items()}
    moved = _exponentiated(situation.previous, {name: settings.eta * value for name, value in excess.items()})
    even = settings.smoothing / len(moved)
    return {name: (1 - settings.smoothing) * share + even for name, share in moved.items()}


def odm(situation: Situation) -> Shares:
    """EXP3 with the loss as the reward (Albalak et al. 2023), a domain being as often asked as its weight says.

    R_j is a moving average of l_j / P_j; P_j = (1 - kε_t) softmax(ε_{t-1} R)_j + ε_t, ε_t = min(1/k, √(ln k / (k t))).
    """
    count, rounds = len(situation.domains), len(situation.history)
    if not rounds or count == 1:
        return uniform(situation)
    rewards = dict.fromkeys(situation.domains, 0.0)
    for trained in situation.history:
        for name in rewards:
            weight = trained.weights[name]
            seen = min(trained.signals[name].loss / weight, LARGEST) if weight else 0.0
            rewards[name] = MEMORY * rewards[name] + (1 - MEMORY) * seen
    now, before = (min(1 / count, math.sqrt(math.log(count) / (count * max(t, 1)))) for t in (rounds, rounds - 1))
    chosen = _exponentiated(uniform(situation), {name: before * reward for name, reward in rewards.items()})
    return {name: (1 - count * now) * share + now for name, share in chosen.items()}


def authors_code(situation: Situation) -> Shares:
    """P · exp(l), normalised: what the authors' published script computes."""
    if situation.previous is None:
        return _known(situation)
    return _exponentiated(situation.previous, {name: found.loss for name, found in situation.signals.items()})


def schedule(situation: Situation) -> Shares:
    """The weights declared for the epoch; after the last ones declared, those."""
    declared = situation.settings.schedule[min(situation.epoch, len(situation.settings.schedule)) - 1]
    return {name: declared.get(name, 0.0) for name in situation.domains}


def _kept(rule: Rule) -> Rule:
    """A rule for the weights before any training, which are never updated."""
    return lambda situation: rule(situation) if situation.previous is None else dict(situation.previous)


ALGORITHMS: Mapping[str, Algorithm] = {
    found.name: found
    for found in (
        Algorithm("uniform", _kept(uniform), "1/k"),
        Algorithm("inverse", _kept(inverse), "(1-P)/Σ(1-P) of the detected P", detects=True),
        Algorithm("constant", _kept(constant), "the detected P, never updated", detects=True),
        Algorithm("versatune", versatune, "Algorithm 2", detects=True, refers=True, moves=True, scales=True),
        Algorithm(
            "versatune-expand",
            versatune_expand,
            "Algorithm 3",
            detects=True,
            refers=True,
            moves=True,
            scales=True,
            expands=True,
        ),
        Algorithm(
            "expand-unbounded",
            expand_unbounded,
            "Algorithm 3 without its condition",
            detects=True,
            refers=True,
            moves=True,
            scales=True,
            expands=True,
            bounded=False,
        ),
        Algorithm(
            "expand-uniform",
            expand_uniform,
            "the targets' share as in Algorithm 3, the rest alike",
            detects=True,
            refers=True,
            moves=True,
            scales=True,
            expands=True,
        ),
        Algorithm("single-domain", _kept(single_domain), "all weight on the target", expands=True),
        Algorithm("natural", _kept(natural), "in proportion to the samples there are", sized=True),
        Algorithm("temperature", _kept(temperature), "natural^(1/τ), normalised", sized=True),
        Algorithm("doremi", doremi, "exponentiated gradient on clipped excess loss", refers=True, moves=True),
        Algorithm("odm", odm, "EXP3 bandit on losses", moves=True),
        Algorithm("authors-code", authors_code, "P·exp(l), normalised", detects=True, moves=True),
        Algorithm("schedule", schedule, "weights declared per epoch"),
    )
}


def named(name: str) -> Algorithm:
    """The algorithm of a name; `module:function` names a rule of the user's own.

    Raises ConfigError when there is no such function. Of such a rule nothing is asked beforehand: it finds in the
    Situation what is there.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"weights.algorithm {name!r} cannot be imported ({error}): put the module on PYTHONPATH, or use one of "
            f"{', '.join(ALGORITHMS)}"
        ) from None
    return Algorithm(name, _checked(name, rule), "a rule of your own", moves=True)


def condition(situation: Situation) -> Condition:
    """Line 8 of Algorithm 3: φ averaged over the domains outside E, γ over E (and times ε)."""
    signals = situation.signals
    return Condition(
        forgetting=_mean([signals[name].forgetting for name in situation.others]),
        bound=situation.settings.epsilon * _mean([signals[name].potential for name in situation.targets]),
    )


def gained(situation: Situation) -> float:
    """The targets' share after a gain of δ, capped so that every other domain keeps the floor."""
    before = math.fsum((situation.previous or {})[name] for name in situation.targets)
    most = 1 - situation.settings.floor * len(situation.others)
    return min(before + situation.settings.delta, max(most, before))


def factor(signal: Signal, sigma: float) -> float:
    """What Algorithm 2 multiplies a weight by: 1 + σγ."""
    return 1 + sigma * signal.potential


def _scaled(situation: Situation) -> Shares:
    """P'_j = P_j (1 + σ γ_j), not normalised."""
    previous, sigma = situation.previous or {}, situation.settings.sigma
    return {name: previous[name] * factor(situation.signals[name], sigma) for name in situation.domains}


def _gained(situation: Situation) -> Shares:
    """δ more for the targets, split by their weights; the others share the rest in proportion to P'_j."""
    total, floor = gained(situation), situation.settings.floor
    scaled, previous = _scaled(situation), situation.previous or {}
    targets = _split({name: previous[name] for name in situation.targets}, total, 0.0)
    others = _split({name: scaled[name] for name in situation.others}, 1 - total, floor)
    return {name: (targets | others)[name] for name in situation.domains}


def _split(masses: Mapping[str, float], total: float, floor: float) -> Shares:
    """A total shared in proportion to masses (alike where all are 0), nobody below the floor."""
    if not any(masses.values()):
        masses = dict.fromkeys(masses, 1.0)
    if total <= 0:
        return dict.fromkeys(masses, 0.0)
    within = lift(normalise(masses), min(floor / total, 1 / len(masses)))
    return {name: total * share for name, share in within.items()}


def _exponentiated(weights: Mapping[str, float], exponents: Mapping[str, float]) -> Shares:
    """P_j exp(x_j), normalised; the largest exponent is taken off first, so that none overflows."""
    largest = max(exponents[name] for name, weight in weights.items() if weight)
    return normalise(
        {name: weight * math.exp(exponents[name] - largest) if weight else 0.0 for name, weight in weights.items()}
    )


def _known(situation: Situation) -> Shares:
    found, domains = situation.knowledge, situation.domains
    if found is None or set(found) != set(domains):
        says = "no detection" if found is None else f"a detection of {', '.join(found)}"
        raise MixtureError(
            f"algorithm '{situation.settings.algorithm}' starts from the knowledge distribution of "
            f"{', '.join(domains)}, found {says}: run `vtmix detect`"
        )
    return normalise({name: found[name] for name in domains})


def _sizes(situation: Situation) -> Mapping[str, int]:
    if situation.sizes is None or not any(situation.sizes.values()):
        raise MixtureError(
            f"algorithm '{situation.settings.algorithm}' follows the sizes of the pools, and these hold no sample: "
            "run `vtmix pool`"
        )
    return situation.sizes


def _mean(values: list[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # divided first, since their sum may overflow


def _checked(name: str, rule: Rule) -> Rule:
    """A user's rule, whose answer is held against what weights are."""

    def checked(situation: Situation) -> Shares:
        found = dict(rule(situation))
        bad = [f"{domain} {share!r}" for domain, share in found.items() if not _is_share(share)]
        if set(found) != set(situation.domains) or bad or abs(math.fsum(found.values()) - 1) > 1e-6:
            raise MixtureError(
                f"weights.algorithm {name!r} gave {found!r} for epoch {situation.epoch}: expected a share from 0 to 1 "
                f"for each of {', '.join(situation.domains)}, which sum to 1"
            )
        return normalise({domain: float(found[domain]) for domain in situation.domains})

    return checked


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
