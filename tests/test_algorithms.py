"""Every rule gives shares of all domains that sum to 1, whatever their order, and does what its formula says."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtmix import config, published
from vtmix.algorithms import ALGORITHMS, Situation, Trained, condition, gained, named
from vtmix.errors import ConfigError, MixtureError
from vtmix.explain import explain
from vtmix.settings import EXPANDING, Algorithm, WeightsSettings
from vtmix.signals import Signal
from vtmix.simplex import normalise
from vtmix.weights import make_weights

NAMES = ("law", "medicine", "finance", "science", "code", "other")
LLAMA_3 = published.distribution("llama-3-8b", NAMES)
SIGNALS = {
    "law": Signal(loss=2.0, reference=1.5, previous=1.9),
    "medicine": Signal(loss=1.8, reference=1.8, previous=2.0),
    "finance": Signal(loss=2.2, reference=1.1, previous=2.4),
    "science": Signal(loss=1.6, reference=1.2, previous=1.6),
    "code": Signal(loss=1.0, reference=0.9, previous=1.1),
    "other": Signal(loss=2.5, reference=2.6, previous=2.6),
}
SIZES = {"law": 1000, "medicine": 4000, "finance": 1000, "science": 500, "code": 2500, "other": 1000}


def situation(algorithm, *, history=(), knowledge=LLAMA_3, domains=NAMES, sizes=SIZES, epoch=None, **settings):
    if algorithm in EXPANDING:
        settings = {"targets": ("medicine",)} | settings
    if algorithm == "schedule":
        settings = {"schedule": ({"law": 0.25, "code": 0.75}, {"medicine": 1.0})} | settings
    return Situation(
        epoch=epoch or len(history) + 1,
        domains=tuple(domains),
        settings=WeightsSettings(algorithm=algorithm, **settings),
        knowledge=knowledge,
        sizes=sizes,
        history=tuple(history),
    )


def shares(algorithm, **changes):
    return make_weights(situation(algorithm, **changes), {}).weights


def test_the_algorithms_of_the_settings_are_those_there_are():
    assert get_args(Algorithm) == tuple(ALGORITHMS)
    assert {name for name, found in ALGORITHMS.items() if found.expands} == set(EXPANDING)


# Recorded: LLaMA-3-8B's published distribution, then one update with SIGNALS. The first worked out by hand:
# masses P(1 + γ/2): law .019423 × 1.125, medicine .064878 × 1, finance .028935 × 1.25, science .074890 × 1.125,
# code .555867 × 1.05, other .256107 × 1 sum to 1.0468, of which each is its share.
FIRST = {
    "uniform": dict.fromkeys(NAMES, 1 / 6),
    "inverse": {name: (1 - LLAMA_3[name]) / 5 for name in NAMES},
    "constant": LLAMA_3,
    "versatune": LLAMA_3,
    "versatune-expand": LLAMA_3,
    "expand-unbounded": LLAMA_3,
    "expand-uniform": {
        name: LLAMA_3["medicine"] if name == "medicine" else (1 - LLAMA_3["medicine"]) / 5 for name in NAMES
    },
    "single-domain": {name: float(name == "medicine") for name in NAMES},
    "natural": {name: SIZES[name] / 10_000 for name in NAMES},
    "temperature": {name: math.sqrt(size) / sum(map(math.sqrt, SIZES.values())) for name, size in SIZES.items()},
    "doremi": dict.fromkeys(NAMES, 1 / 6),
    "odm": dict.fromkeys(NAMES, 1 / 6),
    "authors-code": LLAMA_3,
    "schedule": {"law": 0.25, "medicine": 0.0, "finance": 0.0, "science": 0.0, "code": 0.75, "other": 0.0},
}
FACTORS = {"law": 1.125, "medicine": 1.0, "finance": 1.25, "science": 1.125, "code": 1.05, "other": 1.0}
ALGORITHM_2 = normalise({name: LLAMA_3[name] * factor for name, factor in FACTORS.items()})
EVEN = normalise({name: FIRST["expand-uniform"][name] * factor for name, factor in FACTORS.items()})
EXPANDED = {
    name: LLAMA_3["medicine"] + 0.1
    if name == "medicine"
    else (1 - LLAMA_3["medicine"] - 0.1) * ALGORITHM_2[name] / (1 - ALGORITHM_2["medicine"])
    for name in NAMES
}
# odm after one round: R_j = 0.1 l_j / (1/6), ε_0 = 1/6 and ε_1 = min(1/6, √(ln 6 / 6)) = 1/6, so all weight explores.
SECOND = FIRST | {
    "versatune": ALGORITHM_2,
    "versatune-expand": ALGORITHM_2,  # medicine has no potential (γ = 0), so nothing may be forgotten for it
    "expand-unbounded": EXPANDED,
    "expand-uniform": {
        name: share if name == "medicine" else (1 - EVEN["medicine"]) / 5 for name, share in EVEN.items()
    },
    "doremi": {
        name: 0.999 * share + 0.001 / 6
        for name, share in normalise(
            {name: math.exp(max(found.loss - found.reference, 0)) for name, found in SIGNALS.items()}
        ).items()
    },
    "authors-code": normalise({name: LLAMA_3[name] * math.exp(found.loss) for name, found in SIGNALS.items()}),
    "schedule": {name: float(name == "medicine") for name in NAMES},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_published_knowledge_through_every_rule(algorithm):
    first = shares(algorithm)
    assert first == pytest.approx(FIRST[algorithm], abs=1e-12)
    second = shares(algorithm, history=[Trained(first, SIGNALS)])
    assert second == pytest.approx(SECOND[algorithm], abs=1e-12)


def test_algorithm_2_on_the_published_knowledge_by_hand():
    total = 0.021851 + 0.064878 + 0.036169 + 0.084251 + 0.583660 + 0.256107
    assert shares("versatune", history=[Trained(LLAMA_3, SIGNALS)])["finance"] == pytest.approx(
        0.036169 / total, abs=1e-5
    )


def test_odm_asks_more_often_for_what_has_the_larger_loss_once_it_explores_less():
    history = []
    for _ in range(12):
        history.append(Trained(shares("odm", history=history), SIGNALS))
    found = history[-1].weights
    assert found["other"] == max(found.values())
    assert found["code"] == min(found.values()) > 0


def test_the_temperature_goes_from_natural_to_uniform():
    assert shares("temperature", temperature=1.0) == pytest.approx(shares("natural"))
    assert shares("temperature", temperature=1e9) == pytest.approx(shares("uniform"), abs=1e-6)


# For any numbers


@st.composite
def cases(draw):
    """Domains, a distribution over them, a history of a few epochs with losses from subnormal to enormous, settings."""
    names = NAMES[: draw(st.integers(2, 6))]
    mass = st.floats(1e-9, 1.0)
    loss = st.floats(min_value=0.0, max_value=1e300)

    def weights():
        return normalise({name: draw(mass) for name in names})

    def signals():
        return {name: Signal(draw(loss), draw(loss), draw(st.none() | loss)) for name in names}

    history = [Trained(weights(), signals()) for _ in range(draw(st.integers(0, 3)))]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names) - 1, unique=True))
    return {
        "domains": names,
        "knowledge": weights(),
        "history": history,
        "sizes": {name: draw(st.integers(1, 10**9)) for name in names},
        "targets": tuple(targets),
        "floor": draw(st.floats(0, 1 / len(names))),
        "sigma": draw(st.floats(0, 10)),
        "delta": draw(st.floats(0, 1)),
        "epsilon": draw(st.floats(0, 10)),
        "schedule": (weights(),),
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(case=cases())
def test_weights_stay_on_the_simplex_above_the_floor(algorithm, case):
    found = shares(algorithm, **case)
    assert tuple(found) == case["domains"]
    assert abs(math.fsum(found.values()) - 1) <= 1e-9
    assert all(math.isfinite(share) and share >= case["floor"] - 1e-9 for share in found.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(case=cases(), random=st.randoms())
def test_the_order_of_the_domains_does_not_matter(algorithm, case, random):
    names = list(case["domains"])
    random.shuffle(names)
    assert shares(algorithm, **(case | {"domains": names})) == pytest.approx(shares(algorithm, **case), abs=1e-9)


@given(cases())
def test_targets_grow_by_exactly_delta_when_the_condition_holds_and_no_cap_acts_and_never_otherwise(case):
    case |= {"history": case["history"] or [Trained(case["knowledge"], dict.fromkeys(case["domains"], Signal(1.0)))]}
    found = situation("versatune-expand", **case)
    weights = make_weights(found, {})
    before, after = (math.fsum(of[name] for name in found.targets) for of in (found.previous, weights.weights))
    room = 1 - case["floor"] * len(found.others)
    assert weights.condition.holds == condition(found).holds
    if not weights.condition.holds:
        assert weights.weights == pytest.approx(shares("versatune", **case), abs=1e-12)
        assert weights.condition.gain == 0
    elif before + case["delta"] <= room and min(found.previous.values()) >= case["floor"]:
        assert after == pytest.approx(before + case["delta"], abs=1e-9)
    else:
        assert after <= max(before, room) + 1e-9
    assert gained(found) <= max(before, room) + 1e-12


@given(cases())
def test_several_targets_split_their_gain_by_weight_and_the_others_the_rest_by_algorithm_2(case):
    case |= {"floor": 0.0, "history": case["history"] or [Trained(case["knowledge"], SIGNALS)]}
    found, by_2 = shares("expand-unbounded", **case), shares("versatune", **case)
    previous = case["history"][-1].weights
    for group, original in (
        ([name for name in case["domains"] if name in case["targets"]], previous),
        ([name for name in case["domains"] if name not in case["targets"]], by_2),
    ):
        total, whole = (math.fsum(of[name] for name in group) for of in (found, original))
        for name in group:
            assert found[name] * whole == pytest.approx(original[name] * total, abs=1e-9)


# A rule of one's own


def gentle(situation):
    """Halfway from the weights before to uniform."""
    even = 1 / len(situation.domains)
    return {name: (share + even) / 2 for name, share in (situation.previous or LLAMA_3).items()}


def broken(situation):
    return {"law": 0.5, "code": float("nan")}


def test_a_rule_of_ones_own_is_a_function_named_in_the_configuration():
    found = shares(f"{__name__}:gentle", history=[Trained(LLAMA_3, SIGNALS)])
    assert found == pytest.approx({name: (share + 1 / 6) / 2 for name, share in LLAMA_3.items()})


def test_a_rule_of_ones_own_that_gives_no_weights_is_refused_by_name():
    with pytest.raises(MixtureError, match=r"test_algorithms:broken' gave .*expected a share from 0 to 1"):
        shares(f"{__name__}:broken")


def test_a_rule_that_cannot_be_imported_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'nowhere:rule' cannot be imported.*versatune-expand"):
        named("nowhere:rule")


# What the configuration says of them


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"algorithm": "versatune-expand"}, "needs weights.targets"),
        (
            {"algorithm": "single-domain", "targets": ["law", "code"]},
            "needs weights.targets: one domain or more, but not",
        ),
        ({"algorithm": "single-domain", "targets": ["art"]}, "weights.targets: art is none of the domains law, code"),
        ({"algorithm": "schedule"}, "needs weights.schedule"),
        ({"algorithm": "schedule", "schedule": [{"law": 0.5}]}, "epoch 1 has weights that sum to 0.5"),
        ({"algorithm": "schedule", "schedule": [{"art": 1.0}]}, "epoch 1 has unknown domain art"),
        ({"algorithm": "versatile"}, "weights.algorithm"),
    ],
)
def test_settings_that_make_no_weights_are_refused(tmp_path, weights, sentence):
    domains = {name: {"train": "a.jsonl"} for name in ("law", "code")}
    with pytest.raises(ConfigError) as refusal:
        config.validate({"model": "m", "domains": domains, "weights": weights}, tmp_path / "mixture.yaml")
    assert sentence in str(refusal.value)


# In words


def explained(algorithm, signals=SIGNALS, **changes):
    found = situation(algorithm, history=[Trained(LLAMA_3, signals)], **changes)
    return "\n".join(explain(make_weights(found, {}, unit="nats_per_token"), found.settings))


def test_an_update_is_explained_term_by_term():
    said = explained("versatune")
    assert "epoch 2: versatune (Algorithm 2), nats per token" in said
    assert "law: 0.0194 → 0.0209 (+0.0015)" in said
    assert "γ = (loss - reference) / loss = (2.0000 - 1.5000) / 2.0000 = 0.2500" in said
    assert "factor 1 + σγ = 1 + 0.5 × 0.2500 = 1.1250, then normalised" in said
    assert "= -0.0400, counts as 0.0000: the reference is no better than the model" in said
    assert "φ = (loss - before) / before = (2.0000 - 1.9000) / 1.9000 = 0.0526" in said
    assert "= -0.1000, counts as 0.0000: nothing was forgotten" in said


def test_the_condition_of_algorithm_3_is_explained_with_both_its_sides():
    said = explained("versatune-expand")
    assert "targets medicine: mean φ of the others 0.0105 ≥ 0.0000 = ε × mean γ of the targets (ε = 1)" in said
    assert "the condition does not hold: Algorithm 2 for all domains" in said
    said = explained("versatune-expand", targets=("finance",))
    assert "mean φ of the others 0.0105 < 0.5000" in said
    assert "the condition holds: the targets gain 0.1000 (δ), the others share the rest by Algorithm 2" in said
    said = explained("expand-unbounded", floor=0.15)
    assert "this algorithm does not ask: the targets gain" in said


def test_caps_and_floors_that_acted_are_explained():
    said = explained("versatune-expand", targets=("finance",), delta=0.9, floor=0.1)
    assert "capped from δ = 0.9" in said
    assert "the floor of 0.1 raised" in explained("versatune", floor=0.1)
