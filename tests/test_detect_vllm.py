"""A detection whose samples and judgements both come from vLLM, in its own environment, through Ray."""

from pathlib import Path

import polars as pl
import pytest
from conftest import WORDS
from test_detect import ROOT, World, content_of, parts_in, rows_of, world  # noqa: F401

from vtmix import pool
from vtmix.config import load
from vtmix.detect import detect
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def vllm_settings(python: Path = PYTHON) -> dict:
    environment = {"python": str(python), "arguments": {"kv_cache_memory_bytes": 1 << 27}}
    return {
        "iterations": 2,
        "samples": 12,
        "block": 6,
        "control": 6,
        "max_unclassified": 1.0,  # the tiny model has never heard of letters behind options
        "engine": {"kind": "vllm", **environment},
        "classifier": {"kind": "judge", **environment, "heldout": 4, "permutations": 3},
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM's environment: run `make vllm-env`")
def test_a_part_that_was_lost_is_drawn_and_judged_again_to_the_byte(world: World, tiny_model, ray_cluster):  # noqa: F811
    config = load(world.write("vllm", **vllm_settings()))
    report = detect(config)
    folder = world.detected("vllm")
    whole = content_of(folder)
    every = rows_of(folder)
    rows, control = every.filter(pl.col("iteration") > 0), every.filter(pl.col("iteration") == 0)
    assert (report.samples, len(rows), len(control), parts_in(folder)) == (24, 24, 18, 7)
    assert report.tokens == rows["tokens"].sum() > 24
    tokenizer = load_tokenizer(str(tiny_model))
    for number, domain in enumerate(WORDS):
        opening = tokenizer(pool.texts(world.folder / "pool" / domain)[0], add_special_tokens=False).input_ids[:8]
        assert control.sort("sample")["token_ids"][6 * number].to_list()[:8] == opening
    assert set(rows["finish_reason"]) <= {"length", "stop"}
    assert (report.classifier.kind, report.classifier.heldout_texts) == ("judge", 12)
    assert 0 < report.unclassified < 1
    (folder / "detection.json").unlink()
    (folder / "iteration-02" / "part-00001.parquet").unlink()
    assert detect(config) == report
    assert content_of(folder) == whole


def test_a_missing_interpreter_is_found_before_a_cluster_is_joined(world: World, monkeypatch):  # noqa: F811
    monkeypatch.setattr("vtmix.cluster.connect", lambda cpus: pytest.fail("a cluster was joined"))
    config = load(world.write("no-interpreter", **vllm_settings(Path("absent/bin/python"))))
    with pytest.raises(ConfigError, match="make vllm-env"):
        detect(config)
