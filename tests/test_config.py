"""A configuration is understood in full or refused in full, in words that say how to mend it."""

import datetime
import json

import pytest
import yaml

from vtmix import config
from vtmix.errors import ConfigError
from vtmix.schemas import ARTEFACTS, schemas

MINIMAL = {"model": "some/model", "domains": {"law": {"train": "law.jsonl"}}}


def load(tmp_path, raw, **options):
    path = tmp_path / "mixture.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return config.load(path, **options)


def refusal(tmp_path, raw):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw)
    return str(caught.value)


def test_a_minimal_file_gets_the_papers_settings(tmp_path):
    found = load(tmp_path, MINIMAL)
    assert (found.samples_per_epoch, found.epochs, found.weights.sigma) == (60_000, 4, 0.5)
    assert (found.training.batch_size, found.training.lr, found.training.warmup) == (128, 2e-5, 0.03)
    assert (found.detection.samples, found.detection.iterations) == (40_000, 5)
    assert found.domains["law"].train[0].path == "law.jsonl"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"modle": "x"}, "unknown key 'modle': did you mean 'model'?"),
        ({"training": {"lrr": 1}}, "unknown key 'training.lrr': did you mean 'lr'?"),
        ({"domains": {"law": {"train": [{"path": "a.jsonl", "promt": "q"}]}}}, "did you mean 'prompt'?"),
        ({"domains": {"law": {"trian": "a.jsonl", "train": "a.jsonl"}}}, "'domains.law.trian': did you mean 'train'?"),
        ({"model": {"nam": "x"}}, "did you mean 'name'?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path, change, sentence):
    assert sentence in refusal(tmp_path, {**MINIMAL, **change})


def test_every_offender_is_named_at_once(tmp_path):
    message = refusal(
        tmp_path,
        {"domains": {"Law": {"train": "a.jsonl"}}, "epochs": 0, "weights": {"algorithm": "versatun"}, "sed": 1},
    )
    for part in ("'model' is missing", "'Law'", "epochs", "versatun", "did you mean 'seed'?"):
        assert part in message


@pytest.mark.parametrize("name", ["../up", "a/b", "", "Law", "1st", "a" * 33, ".hidden", "a b", "law\n"])
def test_a_domain_name_that_could_escape_its_folder_is_refused(tmp_path, name):
    assert "cannot be used" in refusal(tmp_path, {**MINIMAL, "domains": {name: {"train": "a.jsonl"}}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: !!python/object/apply:os.system [exit]", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, sentence):
    assert sentence in refusal(tmp_path, text)


def test_yaml_never_runs_code(tmp_path):
    canary = tmp_path / "canary"
    refusal(tmp_path, f"model: !!python/object/apply:os.system ['touch {canary}']")
    assert not canary.exists()


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(ConfigError, match="vtmix init"):
        config.load(tmp_path / "mixture.yaml")


def test_a_source_is_a_file_or_a_dataset_never_both(tmp_path):
    sources = {"law": {"train": [{"path": "a.jsonl", "dataset": "b"}]}}
    assert "exactly one of 'path'" in refusal(tmp_path, {**MINIMAL, "domains": sources})


def test_floors_that_exceed_1_are_refused(tmp_path):
    domains = {name: {"train": "a.jsonl"} for name in ("law", "code", "other")}
    assert "lower it to 0.3333" in refusal(tmp_path, {**MINIMAL, "domains": domains, "weights": {"floor": 0.4}})


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    assert "training.lr" in refusal(tmp_path, {**MINIMAL, "training": {"lr": float("nan")}})


def test_paths_refer_to_the_folder_of_the_file_and_the_run_option_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load(tmp_path, MINIMAL)
    assert found.resolve(found.run) == tmp_path / "run"
    assert found.resolve("data/../x") == tmp_path / "x"
    found = load(tmp_path, MINIMAL, run="mine")
    assert found.resolve(found.run) == tmp_path / "elsewhere" / "mine"


def test_the_resolved_file_reads_back_as_the_same_configuration_and_holds_no_absolute_path(tmp_path):
    found = load(tmp_path, {**MINIMAL, "run": str(tmp_path / "run"), "weights": {"sigma": 0.1}})
    text = config.resolved(found)
    assert str(tmp_path) not in text
    again = load(tmp_path, text)
    assert again.model_dump(exclude={"run"}) == found.model_dump(exclude={"run"})


def test_only_settings_that_change_results_count_as_differences(tmp_path):
    before = load(tmp_path, MINIMAL).model_dump(mode="json")
    steering = {**MINIMAL, "training": {"device": "cpu", "loggers": ["wandb"]}, "detection": {"generate": {"gpus": 1}}}
    assert config.differences(before, load(tmp_path, steering).model_dump(mode="json")) == []
    after = load(tmp_path, {**MINIMAL, "weights": {"sigma": 0.3}}).model_dump(mode="json")
    assert config.differences(before, after) == ["weights.sigma was 0.5, is now 0.3"]


def test_every_execution_only_setting_exists(tmp_path):
    judge = {"engine": {"kind": "vllm", "python": "p"}, "classifier": {"kind": "judge", "python": "p"}}
    endpoint = {"classifier": {"kind": "endpoint", "url": "http://127.0.0.1:8000/v1", "model": "m"}}
    known = {
        key
        for detection in (judge, endpoint)
        for key in config.flatten(load(tmp_path, {**MINIMAL, "detection": detection}).model_dump(mode="json"))
    }
    for name in config.EXECUTION_ONLY:
        assert any(key == name or key.startswith(name + ".") for key in known), name


def test_the_committed_schemas_are_those_of_the_models(pytestconfig):
    folder = pytestconfig.rootpath / "schemas"
    generated = dict(schemas())
    assert {path.name for path in folder.glob("*.schema.json")} == set(generated)
    for name, content in generated.items():
        assert (folder / name).read_text(encoding="utf-8") == content, f"{name} is stale: run `make schemas`"
    assert set(generated) == {f"{name}.schema.json" for name in ("mixture", *ARTEFACTS)}


def test_the_schema_accepts_shorthand_sources(pytestconfig):
    schema = json.loads((pytestconfig.rootpath / "schemas" / "mixture.schema.json").read_text())
    kinds = {
        option.get("type") or option["$ref"] for option in schema["$defs"]["Domain"]["properties"]["train"]["anyOf"]
    }
    assert kinds == {"string", "array", "#/$defs/Source"}


def test_openings_that_leave_nothing_to_continue_are_refused(tmp_path):
    detection = {"control": 4, "opening": 8, "max_tokens": 8}
    assert "openings of 8 tokens leave nothing" in refusal(tmp_path, {**MINIMAL, "detection": detection})
    load(tmp_path, {**MINIMAL, "detection": {**detection, "control": 0}})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"url": "https://me:hush@api.example.com/v1"}, "url holds a user, a password or a query"),
        ({"url": "ftp://me:hush@api.example.com/v1"}, "url holds a user, a password or a query"),
        ({"url": "https://api.example.com/v1?key=hush"}, "url holds a user, a password or a query"),
        ({"extra_body": {"model": "n", "seed": 1, "top_p": 0}}, "extra_body holds 'model', 'top_p', which vtmix sets"),
        ({"extra_body": {"day": datetime.date(2025, 1, 1)}}, "extra_body.day"),
    ],
)
def test_what_an_endpoint_cannot_be_given_is_refused_and_no_secret_repeated(tmp_path, changed, sentence):
    endpoint = {"kind": "endpoint", "url": "http://127.0.0.1/v1", "model": "m", **changed}
    message = refusal(tmp_path, MINIMAL | {"detection": {"classifier": endpoint}})
    assert sentence in message
    assert "hush" not in message
    assert len(message.splitlines()) == 1
