"""The study's arithmetic, on runs written by hand: what is compared with what, and what a run is made from."""

import csv
import math
import sys
from pathlib import Path

import pytest
import yaml

from vtmix import config
from vtmix.artifacts import DomainLoss, Losses, Weights, run_folder

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("law", "code", "other")


@pytest.fixture(scope="module")
def ablation():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import ablation
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return ablation


def written(ablation, folder, algorithm, seed, losses, target=None):
    """A finished run of two epochs with these losses of law, code and other; the base model's are 4, 2 and 1."""
    folder = folder / algorithm / f"seed-{seed}"
    folder.mkdir(parents=True)
    raw = {"model": "none", "epochs": 2, "domains": {name: {"train": "-"} for name in DOMAINS}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    run = run_folder(config.load(folder / "mixture.yaml"))
    for epoch, values in enumerate([(4.0, 2.0, 1.0), *losses]):
        domains = {
            name: DomainLoss(nats=value * 10, tokens=10, bytes=40, samples=2)
            for name, value in zip(DOMAINS, values, strict=True)
        }
        Losses(epoch=epoch, tokenizer="t", mixture=None, domains=domains).publish(run.losses(epoch))
        if epoch:
            Weights(epoch=epoch, weights={"law": 0.5, "code": 0.25, "other": 0.25}).publish(run.weights(epoch))
    return ablation.Run(algorithm, target, seed, folder)


def test_a_final_loss_is_compared_with_the_baselines_of_the_same_seed(ablation, tmp_path):
    found = [
        written(ablation, tmp_path, "uniform", 1, [(3, 2, 1), (2, 1, 1)]),
        written(ablation, tmp_path, "uniform", 2, [(3, 2, 1), (4, 2, 2)]),
        written(ablation, tmp_path, "versatune", 1, [(3, 2, 1), (1, 1, 1)]),
        written(ablation, tmp_path, "versatune", 2, [(3, 2, 1), (5, 2, 2)]),
    ]
    compared = {(title, name): values for title, name, values in ablation.against_baseline(found)}
    assert compared["versatune", "law"] == [1 / 2 - 1, 5 / 4 - 1]
    assert compared["versatune", "code"] == [0, 0]
    assert compared["versatune", "mean"] == [3 / 4 - 1, pytest.approx(9 / 8 - 1)]
    assert compared["versatune", "perplexity"] == pytest.approx([math.exp(1 - 4 / 3) - 1, math.exp(3 - 8 / 3) - 1])
    assert compared["uniform", "mean"] == compared["uniform", "perplexity"] == [0, 0]


def test_a_target_and_the_others_are_compared_with_the_base_model_epoch_by_epoch(ablation, tmp_path):
    found = [
        written(ablation, tmp_path, "single-domain", 1, [(2, 3, 1), (1, 4, 2)], target="law"),
        written(ablation, tmp_path, "single-domain", 2, [(3, 2, 1), (2, 4, 1)], target="law"),
    ]
    first, second = ablation.changes(found)
    assert first == ("single-domain", "law", 1, [-0.5, -0.25], [0.5, 0])
    assert second == ("single-domain", "law", 2, [-0.75, -0.5], [2, 1])


def test_an_interval_is_students(ablation):
    mean, half = ablation.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(ablation.interval([1.0])[1])


def test_the_report_holds_every_loss_and_is_drawn(ablation, tmp_path, capsys):
    found = [
        written(ablation, tmp_path, "uniform", 1, [(3, 2, 1), (2, 1, 1)]),
        written(ablation, tmp_path, "versatune", 1, [(3, 2, 1), (1, 1, 1)]),
        written(ablation, tmp_path, "single-domain", 1, [(2, 3, 1), (1, 4, 2)], target="law"),
    ]
    figures = ablation.report(found, tmp_path / "report")
    assert figures["multi"] == {"uniform": 0, "versatune": -0.25}
    assert figures["expand"] == {"law": {"single-domain": {"target": [-0.5, -0.75], "others": [0.5, 2]}}}
    assert "| versatune | -50.00% | +0.00% | +0.00% | -25.00% | -28.35% |" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "report" / "ablation.csv").open()))
    assert len(rows) == 3 * 3 * 3
    assert {name: rows[-3][name] for name in ("algorithm", "epoch", "domain", "weight", "loss")} == {
        "algorithm": "single-domain",
        "epoch": "2",
        "domain": "law",
        "weight": "0.5",
        "loss": "1.0",
    }
    for name in ("radar.svg", "weights.svg", "expansion.svg"):
        assert (tmp_path / "report" / name).read_text().startswith("<?xml")


def test_the_papers_settings_are_those_of_the_paper():
    settings = config.load(ROOT / "examples" / "paper" / "mixture.yaml")
    assert list(settings.domains) == ["law", "medicine", "finance", "science", "code", "other"]
    assert (settings.epochs, settings.samples_per_epoch) == (4, 60_000)
    assert (settings.detection.iterations, settings.detection.samples) == (5, 40_000)
    assert (settings.weights.sigma, settings.weights.delta, settings.weights.epsilon) == (0.5, 0.1, 1.0)
    training = settings.training
    assert (training.batch_size, training.lr, training.warmup, training.weight_decay) == (128, 2e-5, 0.03, 0.0)


def test_a_configuration_moved_elsewhere_still_names_its_files(ablation, tmp_path):
    there = tmp_path / "there"
    (there / "model").mkdir(parents=True)
    raw = {
        "model": "model",
        "domains": {"law": {"train": "law.jsonl", "eval": "val.jsonl"}, "code": {"train": {"dataset": "hub/name"}}},
        "detection": {"engine": {"kind": "vllm", "python": "env/bin/python"}},
    }
    (there / "mixture.yaml").write_text(yaml.safe_dump(raw))
    moved = ablation.write(
        ablation.absolute(config.load(there / "mixture.yaml"), tmp_path / "pool"), tmp_path / "here", seed=3
    )
    assert moved.model_location(moved.model) == str(there / "model")
    assert [source.path for source in (*moved.domains["law"].train, *moved.domains["law"].eval)] == [
        str(there / "law.jsonl"),
        str(there / "val.jsonl"),
    ]
    assert moved.domains["code"].train[0].dataset == "hub/name"
    assert moved.detection.engine.python == str(there / "env" / "bin" / "python")
    assert moved.pool.folder == str(tmp_path / "pool")
    assert moved.seed == 3
