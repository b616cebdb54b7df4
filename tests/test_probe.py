"""The probe tells the domains apart, says how well, and leaves what it cannot read unclassified."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import WORDS, sentence
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from vtmix.classify import CHARACTERS_PER_TOKEN, MeasuredClassifier, blank, cut, measure, publish_judged, read_judged
from vtmix.errors import DamageError, DetectionError, MissingError
from vtmix.probe import FittedProbe, LinearProbe, StaticEmbedding, fit_probe

TEXTS = {domain: [sentence(domain, index, 30) for index in range(50)] for domain in WORDS}


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    return fit_probe(TEXTS, max_tokens=16, folds=5)[0]


def test_rows_are_probabilities_over_domains_in_order_and_the_unclassified_mass(fitted):
    probe = LinearProbe(fitted)
    rows = probe([sentence(domain, 900, 30) for domain in WORDS] + ["", "🙂"])
    assert rows.shape == (5, 4)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-12)
    assert fitted.domains == tuple(WORDS)
    assert rows[:3].argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", " ", "\n\t  \n", "\ufffd" * 50, "\x00", " \ufffd\x1b\ufeff\n"])
def test_a_text_with_nothing_to_embed_is_wholly_unclassified(fitted, text):
    assert LinearProbe(fitted)([text]).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("text", ["court\ufffd\x00", "é", "x" * 100_000, "court " * 10_000, "\u202e\u200b🙂"])
def test_odd_and_long_texts_are_judged_like_any(fitted, text):
    (row,) = LinearProbe(fitted)([text])
    assert np.isfinite(row).all()
    assert abs(row.sum() - 1) < 1e-12


@given(st.text("\ufffd \n\x00\x7f\u200b"), st.characters(categories=["L", "N", "P", "S"], exclude_characters="\ufffd"))
def test_a_text_is_blank_as_long_as_it_shows_no_character(nothing, shown):
    assert blank(nothing)
    assert not blank(nothing + shown + nothing)


def test_labelled_texts_that_show_nothing_within_a_samples_length_are_left_out():
    assert cut({"law": ["court", "\ufffd", " " * 40 + "court", "\x00court"]}, 4) == {"law": ["court", "\x00court"]}


def test_no_texts_give_no_rows(fitted):
    assert LinearProbe(fitted)([]).shape == (0, 4)


def test_texts_it_has_not_seen_measure_the_probe(fitted):
    report = fitted.report
    assert report.kind == "probe"
    assert report.heldout_texts == 150
    assert report.accuracy > 0.95
    assert report.macro_f1 > 0.95
    assert report.calibration_error < 0.15
    for domain, shares in report.confusion.items():
        assert list(shares) == [*WORDS, "unclassified"]
        assert shares[domain] == max(shares.values())
        assert sum(shares.values()) == pytest.approx(1)


def test_a_text_is_measured_by_a_fit_without_it():
    # One text of law is code's: it is judged as code all the same, since the fit that judges it has not seen it.
    mislabelled = {**TEXTS, "law": [*TEXTS["law"][:-1], sentence("code", 900, 30)]}
    _, judged = fit_probe(mislabelled, max_tokens=16, folds=5)
    assert judged["law"].argmax(axis=1).tolist() == [0] * 49 + [2]


def test_texts_are_cut_to_the_length_of_samples():
    characters = 16 * CHARACTERS_PER_TOKEN
    longer = {domain: [text[:characters] + " artery" * 20 for text in found] for domain, found in TEXTS.items()}
    assert fit_probe(longer, max_tokens=16, folds=5)[0] == fit_probe(TEXTS, max_tokens=16, folds=5)[0]


def test_the_temperature_makes_confidence_match_accuracy():
    # A fifth of each domain's texts are another's, in no way that can be told: 80 % is all a probe can be sure of.
    names = list(WORDS)
    confused = {
        domain: [sentence(names[(place + (index % 5 == 0)) % 3], index + 1000 * place, 30) for index in range(200)]
        for place, domain in enumerate(names)
    }
    fitted, judged = fit_probe(confused, max_tokens=16, folds=4)
    confidence = np.vstack(list(judged.values())).max(axis=1).mean()
    assert 0.6 < fitted.report.accuracy < 0.82
    assert confidence == pytest.approx(fitted.report.accuracy, abs=0.06)


def test_judgements_survive_their_file_and_what_is_none_is_refused(tmp_path):
    _, judged = fit_probe(TEXTS, max_tokens=16, folds=5)
    path = tmp_path / "heldout.parquet"
    with pytest.raises(MissingError, match=r"classifier\.json"):
        read_judged(path, list(WORDS))
    publish_judged(path, judged)
    found = read_judged(path, list(WORDS))
    assert all((found[domain] == rows).all() for domain, rows in judged.items())
    for broken in (b"", path.read_bytes()[:200]):
        path.write_bytes(broken)
        with pytest.raises(DamageError, match=r"heldout\.parquet"):
            read_judged(path, list(WORDS))


def test_a_domain_with_more_texts_is_not_preferred():
    few = {domain: found[: 10 if domain == "law" else 50] for domain, found in TEXTS.items()}
    probe = LinearProbe(fit_probe(few, max_tokens=16, folds=5)[0])
    assert probe(["zebra"])[0, :3].min() > 0.15


def test_a_probe_survives_its_file(fitted, tmp_path):
    path = tmp_path / "classifier.json"
    fitted.publish(path)
    loaded = FittedProbe.read(path, "")
    texts = [text for found in TEXTS.values() for text in found]
    assert (LinearProbe(loaded)(texts) == LinearProbe(fitted)(texts)).all()


def test_the_published_schema_takes_a_fitted_probe_and_a_measured_judge(fitted, pytestconfig):
    schema = json.loads((pytestconfig.rootpath / "schemas" / "classifier.schema.json").read_text(encoding="utf-8"))
    accepts = Draft202012Validator(schema).is_valid
    _, judged = fit_probe(TEXTS, max_tokens=16, folds=5)
    judge = MeasuredClassifier(domains=tuple(WORDS), report=measure("endpoint", judged))
    assert accepts(json.loads(fitted.text()))
    assert accepts(json.loads(judge.text()))
    assert not accepts({**json.loads(judge.text()), "temperature": 1.0})  # half a probe


def test_a_text_is_judged_alike_whatever_stands_beside_it(fitted):
    probe = LinearProbe(fitted)
    texts = [text for found in TEXTS.values() for text in found]
    np.testing.assert_allclose(probe(texts)[7], probe(texts[7:8])[0], rtol=1e-12)
    assert (StaticEmbedding()(texts)[7] == StaticEmbedding()(texts[7:8])[0]).all()


@pytest.mark.parametrize("domains", [["law"], ["law", "code"]])
def test_one_or_two_domains_are_enough(domains):
    fitted, _ = fit_probe({domain: TEXTS[domain] for domain in domains}, max_tokens=16, folds=5)
    rows = LinearProbe(fitted)([TEXTS[domain][0] for domain in domains] + [""])
    assert rows[: len(domains)].argmax(axis=1).tolist() == list(range(len(domains)))
    assert rows[-1, -1] == 1
    assert fitted.report.accuracy == 1


def test_domains_with_too_few_texts_are_all_named():
    with pytest.raises(DetectionError) as error:
        fit_probe({**TEXTS, "law": ["a"] * 9, "code": ["b", " ", ""]}, max_tokens=16, folds=5)
    message = str(error.value)
    assert "domain 'law' has 9 texts to fit the classifier on, expected at least 10: add samples" in message
    assert "domain 'code' has 1 texts" in message
    assert "medicine" not in message


def test_the_report_computes_what_it_names():
    judged = {
        "a": np.array([[0.95, 0.05, 0.0], [0.15, 0.85, 0.0]]),
        "b": np.array([[0.05, 0.95, 0.0], [0.0, 0.0, 1.0]]),
    }
    report = measure("probe", judged)
    assert report.heldout_texts == 4
    assert report.accuracy == 0.5
    # a: precision 1/1, recall 1/2; b: precision 1/2, recall 1/2.
    assert report.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    # Confidence .95 and .95, right both; .85, wrong; 0, wrong.
    assert report.calibration_error == pytest.approx(0.5 * 0.05 + 0.25 * 0.85 + 0.25 * 0)
    assert report.confusion["b"] == pytest.approx({"a": 0.025, "b": 0.475, "unclassified": 0.5})


def test_wordllama_is_read_but_not_imported():
    code = "import sys, vtmix.probe; vtmix.probe.StaticEmbedding(); print('wordllama' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
