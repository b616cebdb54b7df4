"""How weights move, against numbers worked out by hand and against what the method promises for any numbers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtmix.algorithms import Situation, Trained
from vtmix.artifacts import DomainLoss, Losses, Reference, ReferenceLoss
from vtmix.errors import LossError, MixtureError
from vtmix.settings import WeightsSettings
from vtmix.signals import Signal, check_losses, make_signals, unit_of
from vtmix.simplex import lift, normalise
from vtmix.weights import make_weights

positive = st.floats(min_value=1e-300, max_value=1e300)
NAMES = ("law", "medicine", "finance", "science", "code", "other")


@st.composite
def simplexes(draw, smallest=2, largest=12):
    size = draw(st.integers(smallest, largest))
    masses = draw(st.lists(st.floats(1e-6, 1.0), min_size=size, max_size=size))
    return normalise({f"d{number}": mass for number, mass in enumerate(masses)})


@st.composite
def updates(draw):
    """Weights on the simplex and a signal per domain, from subnormal to enormous losses."""
    weights = draw(simplexes())
    loss = st.floats(min_value=0.0, max_value=1e300)
    return weights, {name: Signal(loss=draw(loss), reference=draw(loss)) for name in weights}


def loss(nats, tokens=100, size=400, error=None):
    return DomainLoss(nats=nats, tokens=tokens, bytes=size, samples=10, standard_error=error)


def losses(epoch=1, tokenizer="t", **domains):
    return Losses(epoch=epoch, tokenizer=tokenizer, mixture="m", domains=domains)


def reference(tokenizer="t", **nats):
    return Reference(
        tokenizer=tokenizer,
        domains={
            name: ReferenceLoss(nats=value, tokens=100, bytes=400, samples=10, epoch=1) for name, value in nats.items()
        },
    )


def weigh(previous, now, before=None, ceiling=None, **settings):
    """The weights after an epoch trained with `previous`, as the loop makes them."""
    check_losses(now, tuple(previous))
    unit = unit_of(now, ceiling)
    history = (Trained(previous, make_signals(now, before, ceiling, unit)),)
    situation = Situation(now.epoch + 1, tuple(previous), WeightsSettings(**settings), history=history)
    return make_weights(situation, {}, unit=unit, losses=now, losses_before=before)


def update(weights, signals, sigma, floor):
    """Algorithm 2, and the floor."""
    settings = WeightsSettings(sigma=sigma, floor=floor)
    return make_weights(Situation(2, tuple(weights), settings, history=(Trained(weights, signals),)), {}).weights


def initial(algorithm, domains, detected, floor=0.0):
    """The weights before any training."""
    return make_weights(Situation(1, domains, WeightsSettings(algorithm=algorithm, floor=floor), detected), {}).weights


def test_algorithm_2_by_hand():
    """law: γ = (2.0 - 1.5) / 2.0 = 0.25, factor 1.125; code: γ = (1.0 - 0.9) / 1.0 = 0.1, factor 1.05.

    Masses 0.6 × 1.125 = 0.675 and 0.4 × 1.05 = 0.42 sum to 1.095, so the weights are 0.675 / 1.095 and 0.42 / 1.095.
    """
    found = weigh(
        {"law": 0.6, "code": 0.4},
        losses(law=loss(200), code=loss(100)),
        before=losses(epoch=0, law=loss(160), code=loss(110)),
        ceiling=reference(law=150, code=90),
        sigma=0.5,
    )
    assert found.epoch == 2
    assert found.weights["law"] == pytest.approx(0.675 / 1.095, abs=1e-15)
    assert found.weights["code"] == pytest.approx(0.42 / 1.095, abs=1e-15)
    law, code = found.terms["law"], found.terms["code"]
    assert (law.potential, law.factor) == (pytest.approx(0.25), pytest.approx(1.125))
    assert law.forgetting == pytest.approx(0.25)  # (2.0 - 1.6) / 1.6
    assert (code.forgetting, code.forgetting_raw) == (0.0, pytest.approx(-0.1 / 1.1))
    assert found.unit == "nats_per_token"


def test_a_reference_worse_than_the_model_gives_no_potential_but_is_recorded():
    signal = Signal(loss=1.0, reference=1.5)
    assert (signal.potential, signal.potential_raw) == (0.0, -0.5)


def test_losses_under_two_tokenizers_are_compared_per_byte():
    found = weigh(
        {"law": 0.5, "code": 0.5},
        losses(law=loss(200, size=400), code=loss(200, size=200)),
        ceiling=reference(tokenizer="another", law=100, code=100),
    )
    assert found.unit == "nats_per_byte"
    assert found.terms["law"].loss == pytest.approx(0.5)
    assert found.terms["law"].potential == pytest.approx((0.5 - 0.25) / 0.5)
    assert any("per byte" in warning for warning in found.warnings)


@pytest.mark.parametrize("algorithm", ["uniform", "inverse", "constant"])
def test_baselines_never_move(algorithm):
    before = {"law": 0.7, "code": 0.3}
    found = weigh(before, losses(law=loss(200), code=loss(100)), ceiling=reference(law=1, code=99), algorithm=algorithm)
    assert found.weights == before


def test_initial_weights_by_hand():
    """inverse: masses 1 - P = 0.5, 0.7, 0.8 sum to 2."""
    detected = {"law": 0.5, "code": 0.3, "other": 0.2}
    domains = tuple(detected)
    assert initial("uniform", domains, None, 0.0) == dict.fromkeys(domains, pytest.approx(1 / 3))
    assert initial("constant", domains, detected, 0.0) == pytest.approx(detected)
    assert initial("versatune", domains, detected, 0.0) == pytest.approx(detected)
    assert initial("inverse", domains, detected, 0.0) == pytest.approx({"law": 0.25, "code": 0.35, "other": 0.4})


def test_initial_weights_need_a_detection_of_the_same_domains():
    with pytest.raises(MixtureError, match="run `vtmix detect`"):
        initial("versatune", ("law", "code"), None, 0.0)
    with pytest.raises(MixtureError, match="a detection of law"):
        initial("versatune", ("law", "code"), {"law": 1.0}, 0.0)


@given(updates(), st.floats(0, 10), st.floats(0, 0.08))
def test_weights_stay_on_the_simplex_above_the_floor(case, sigma, floor):
    weights, signals = case
    found = update(weights, signals, sigma, floor)
    assert abs(math.fsum(found.values()) - 1) <= 1e-12
    assert all(math.isfinite(weight) and weight >= floor - 1e-15 for weight in found.values())
    assert list(found) == list(weights)


@given(updates(), st.floats(0, 10), st.floats(0, 0.08), st.randoms())
def test_relabelling_domains_commutes_with_the_update(case, sigma, floor, random):
    weights, signals = case
    names = list(weights)
    random.shuffle(names)
    direct = update(weights, signals, sigma, floor)
    shuffled = update({name: weights[name] for name in names}, {name: signals[name] for name in names}, sigma, floor)
    assert shuffled == pytest.approx(direct, abs=1e-14)


@given(simplexes(), positive, st.floats(0, 1), st.floats(0, 10))
def test_equal_potentials_leave_the_weights_unchanged(weights, level, share, sigma):
    signals = {name: Signal(loss=level, reference=level * share) for name in weights}
    assert update(weights, signals, sigma, 0.0) == pytest.approx(weights, abs=1e-14)


@given(updates(), st.floats(0, 10))
def test_a_larger_potential_never_lowers_a_weight_relative_to_another(case, sigma):
    weights, signals = case
    found = update(weights, signals, sigma, 0.0)
    names = sorted(weights, key=lambda name: signals[name].potential)
    for low, high in pairwise(names):
        assert found[high] * weights[low] >= found[low] * weights[high] - 1e-12


@given(simplexes(), st.floats(0, 0.08))
def test_the_floor_takes_only_from_those_above_it(weights, floor):
    found = lift(weights, floor)
    assert all(found[name] <= max(weights[name], floor) + 1e-12 for name in weights)


def test_a_floor_that_cannot_be_met_is_refused():
    with pytest.raises(MixtureError, match="exceeds 1"):
        lift({"law": 0.5, "code": 0.5}, 0.6)


BAD = {
    "nan": (losses(law=loss(math.nan), code=loss(1)), "eval loss of 'law' is nan at epoch 1"),
    "infinite": (losses(law=loss(math.inf), code=loss(1)), "eval loss of 'law' is inf at epoch 1"),
    "negative": (losses(law=loss(-1.0), code=loss(1)), "eval loss of 'law' is negative"),
    "missing": (losses(code=loss(1)), "eval loss of 'law' is missing at epoch 1"),
    "foreign": (losses(law=loss(1), code=loss(1), art=loss(1)), "'art' has an eval loss at epoch 1 but is no domain"),
    "empty": (losses(law=loss(1, tokens=0), code=loss(1)), "taken over 0 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_losses_are_refused_by_name(case):
    found, message = BAD[case]
    with pytest.raises(LossError, match=f"refusing to update weights: .*{message}"):
        weigh({"law": 0.5, "code": 0.5}, found, ceiling=reference(law=1, code=1))


def test_every_bad_loss_is_named_at_once():
    with pytest.raises(LossError) as refusal:
        weigh({"law": 0.5, "code": 0.5}, losses(law=loss(math.nan), art=loss(1)), ceiling=reference(law=1, code=1))
    assert all(name in str(refusal.value) for name in ("'law'", "'code'", "'art'"))


@pytest.mark.parametrize(
    ("now", "ceiling", "sentence"),
    [
        ((200, 100), (300, 200), "no better than the model anywhere"),
        ((200, 100), (0.1, 0.1), "has memorised its data"),
        ((200, 100), (100, 50), "equal in all domains: no weight moves"),
    ],
)
def test_dead_signals_are_said_aloud(now, ceiling, sentence):
    found = weigh(
        {"law": 0.5, "code": 0.5},
        losses(law=loss(now[0]), code=loss(now[1])),
        ceiling=reference(law=ceiling[0], code=ceiling[1]),
    )
    assert any(sentence in warning for warning in found.warnings)


def test_a_change_within_the_noise_is_said_aloud():
    found = weigh(
        {"law": 0.5, "code": 0.5},
        losses(law=loss(200, error=0.05), code=loss(100, error=0.05)),
        before=losses(epoch=0, law=loss(201), code=loss(150)),
        ceiling=reference(law=150, code=50),
    )
    noise = [warning for warning in found.warnings if "standard error" in warning]
    assert len(noise) == 1
    assert "'law' changed by -0.0100" in noise[0]


def test_a_domain_at_zero_is_said_aloud_and_stays_there():
    found = weigh({"law": 1.0, "code": 0.0}, losses(law=loss(200), code=loss(100)), ceiling=reference(law=1, code=1))
    assert found.weights["code"] == 0.0
    assert any("'code' has weight 0" in warning for warning in found.warnings)


def test_the_floor_acts_on_the_first_epoch_too():
    found = initial("constant", ("law", "code"), {"law": 0.99, "code": 0.01}, floor=0.1)
    assert found == {"law": pytest.approx(0.9), "code": pytest.approx(0.1)}
