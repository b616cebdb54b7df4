"""A replay gives the weights that a run gave, or would have given; what cannot be read is named by line."""

import csv
import io
import json

import pytest
from conftest import write_jsonl
from handmade import run_of
from test_algorithms import NAMES, SIGNALS, SIZES, shares
from test_loop import losses, with_potentials, without_weights
from typer.testing import CliRunner

from vtmix import loop, replay
from vtmix.algorithms import ALGORITHMS, Trained
from vtmix.artifacts import Weights, run_folder
from vtmix.cli import app
from vtmix.errors import ConfigError, MissingError, RecordError
from vtmix.settings import EXPANDING

KNOWLEDGE = {"law": 0.5, "medicine": 0.2, "code": 0.3}
LINES = [
    {"knowledge": KNOWLEDGE, "reference": {"law": 1.0, "medicine": 3.0, "code": 0.5}},
    {"epoch": 1, "losses": {"law": 2.0, "medicine": 3.0, "code": 1.0}},
    {"epoch": 2, "losses": {"law": 1.0, "medicine": 3.0, "code": 1.0}},
]


def recording(tmp_path, lines=None):
    return replay.read(write_jsonl(tmp_path / "losses.jsonl", LINES if lines is None else lines))


def of_one(found, algorithm="versatune", **choice):
    (result,) = replay.replays(found, [algorithm], {name: [value] for name, value in choice.items()})
    return [weights.weights for weights in result.weights]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("algorithm", ["versatune", "doremi", "odm", "authors-code", "versatune-expand", "natural"])
def test_a_run_replayed_gives_the_weights_it_was_trained_with(tmp_path, algorithm, first):
    weights = {"algorithm": algorithm, "update_before_first_epoch": first, "sigma": 0.7, "floor": 0.01}
    targets = {"targets": ["code"]} if algorithm in EXPANDING else {}
    config = with_potentials(without_weights(run_of(tmp_path, weights=weights | targets)))
    mixture = loop.begin(config, losses())
    while mixture:
        mixture = loop.advance(config, mixture.epoch, losses(law=2.0 / mixture.epoch, code=1 + mixture.epoch / 10))
    run = run_folder(config)
    committed = [Weights.read(run.weights(epoch), "").weights for epoch in (1, 2, 3)]
    replayed = of_one(replay.read(run.path), algorithm)
    assert replayed[:3] == committed
    assert len(replayed) == 4  # and what a fourth epoch would begin with


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in (*EXPANDING, "schedule")])
def test_a_file_of_losses_goes_through_the_same_arithmetic(tmp_path, algorithm):
    found = {
        name: {domain: getattr(SIGNALS[domain], name) for domain in NAMES} for name in ("loss", "reference", "previous")
    }
    lines = [
        {"knowledge": shares("constant"), "reference": found["reference"], "sizes": SIZES},
        {"epoch": 0, "losses": found["previous"]},
        {"epoch": 1, "losses": found["loss"]},
    ]
    first, second = of_one(recording(tmp_path, lines), algorithm)
    assert first == pytest.approx(shares(algorithm), rel=1e-12)
    assert second == pytest.approx(shares(algorithm, history=(Trained(first, SIGNALS),)), rel=1e-12)


def test_every_combination_of_values_is_tried_and_listed_in_the_csv(tmp_path):
    tried = replay.choices(["sigma=0.1, 0.5,1", "floor=0,0.05"])
    found = replay.replays(recording(tmp_path), ["versatune", "uniform"], tried)
    assert len(found) == 12
    rows = list(csv.DictReader(io.StringIO(replay.as_csv(found))))
    assert len(rows) == 12 * 3 * 3
    (row,) = [
        row
        for row in rows
        if (row["algorithm"], row["sigma"], row["floor"], row["epoch"], row["domain"])
        == ("versatune", "0.5", "0", "2", "law")
    ]
    # P' = .5 × 1.25, .2 × 1, .3 × 1.25
    assert float(row["weight"]) == pytest.approx(0.625 / (0.625 + 0.2 + 0.375))


def test_a_set_of_targets_stands_in_brackets(tmp_path):
    assert replay.choices(["targets=law,[law,code]"]) == {"targets": [["law"], ["law", "code"]]}
    alone, both = replay.replays(recording(tmp_path), ["versatune-expand"], replay.choices(["targets=law,[law,code]"]))
    assert alone.title == "versatune-expand targets=law"
    assert both.title == "versatune-expand targets=law+code"
    assert alone.weights[1].weights["law"] == pytest.approx(0.6)


def test_the_command_prints_a_table_and_writes_csv_and_a_chart(tmp_path):
    path = write_jsonl(tmp_path / "losses.jsonl", LINES)
    command = ["replay", str(path), "--set", "sigma=0.1,1", "--csv", str(tmp_path / "weights.csv"), "--chart"]
    charts = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for chart in charts:
        done = CliRunner().invoke(app, [*command, str(chart)], catch_exceptions=False)
        assert done.exit_code == 0
        assert "versatune sigma=0.1" in done.output
    assert (
        (tmp_path / "weights.csv").read_text().startswith("algorithm,sigma,epoch,domain,weight\nversatune,0.1,1,law,")
    )
    assert charts[0].read_bytes() == charts[1].read_bytes()
    assert b"versatune sigma=1" in charts[0].read_bytes()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "holds no losses"),
        ([{"epoch": 1}], r"losses.jsonl:1: line: .*'epoch' and 'losses' come together"),
        ([{"epoch": 2, "losses": {"law": 1.0}}], r":1: epoch 2, expected 1: epochs come in order"),
        ([*LINES, LINES[1]], r":4: epoch 1, expected 3"),
        ([*LINES, {"epoch": 3, "losses": {"law": 1.0}}], r":4: losses of law, expected those of law, medicine, code"),
        ([LINES[0], {"epoch": 1, "losses": {"law": -1}}], r":2: losses.law: .*greater than or equal to 0"),
        ([{"loses": {}}], r":1: loses: Extra inputs are not permitted"),
    ],
)
def test_a_recording_that_is_none_is_refused_by_file_and_line(tmp_path, lines, sentence):
    with pytest.raises(RecordError, match=sentence):
        recording(tmp_path, lines)


def test_a_line_that_is_not_json_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\nNaN,\n")
    with pytest.raises(RecordError, match=r"losses\.jsonl:2: is not JSON"):
        replay.read(path)


def test_a_rule_whose_reference_losses_were_not_recorded_is_refused(tmp_path):
    with pytest.raises(MissingError, match="'versatune' compares losses with reference losses"):
        of_one(recording(tmp_path, [{"knowledge": KNOWLEDGE}, LINES[1]]))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("sgma=1", "--set sgma=1: expected SETTING=VALUE"),
        ("algorithm=uniform", "--set algorithm=uniform: expected SETTING=VALUE"),
        ("sigma", "--set sigma: expected SETTING=VALUE"),
        ("sigma={", "is no value"),
    ],
)
def test_what_is_no_setting_is_refused_with_those_there_are(option, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replay.choices([option])


def test_a_value_that_a_setting_cannot_have_is_refused_as_in_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"weights\.sigma: Input should be greater than or equal to 0"):
        of_one(recording(tmp_path), sigma=-1)


def test_a_chart_of_no_known_format_is_refused_before_anything_is_read(tmp_path):
    done = CliRunner().invoke(app, ["replay", str(tmp_path), "--chart", "weights.xls"])
    assert isinstance(done.exception, ConfigError)
    assert "a chart's name ends in .svg, .png, .pdf" in str(done.exception)


def test_a_run_whose_pools_stand_elsewhere_is_replayed_by_their_sizes(tmp_path):
    weights = {"algorithm": "natural"}
    config = with_potentials(without_weights(run_of(tmp_path, weights=weights, pool={"folder": "pools"})))
    loop.begin(config, losses())
    run = run_folder(config)
    assert of_one(replay.read(run.path), "natural")[0] == Weights.read(run.weights(1), "").weights
