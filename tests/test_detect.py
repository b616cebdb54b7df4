"""Detection counts every sample once, whatever dies, and commits nothing it cannot stand behind."""

import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import NODES_KEY, WORDS, records, write_jsonl
from test_generate import altered, silent
from test_judge import Server, chat

from vtmix import commit, detect, estimate, forecast, loop, pool, pooling, published, show, stages
from vtmix.artifacts import DetectionReport, run_folder
from vtmix.classify import blank
from vtmix.config import load
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, ConflictError, DamageError, DetectionError, LockedError, MissingError
from vtmix.generate import TransformersGenerator, sampling
from vtmix.probe import LinearProbe
from vtmix.samples import Block, Parts, Sample, schema_of
from vtmix.settings import MixtureConfig

ROOT = Path(__file__).parents[1]
SIZES = {"iterations": 2, "samples": 204, "block": 8, "max_tokens": 16, "precision": "fp32"}
BLOCKS = 2 * 26
KILLS = 5


class World:
    """A folder with data, one pool, and as many runs as a test wants."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        for domain in WORDS:
            write_jsonl(folder / "data" / f"{domain}.jsonl", records(domain, 60))
        self._content = {
            "model": str(model),
            "seed": 7,
            "domains": {domain: {"train": f"data/{domain}.jsonl"} for domain in WORDS},
            "encoding": {"max_length": 64},
            "pool": {"folder": "pool", "eval_fraction": 0.2},
            "detection": SIZES,
        }
        pooling.build(load(self.write("pools")), workers=1)

    def write(self, run: str, model: Path | None = None, **detection) -> Path:
        """Writes <run>.yaml for a run folder of that name; returns its path."""
        content = {**self._content, "run": run, "detection": SIZES | detection}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content | ({"model": str(model)} if model else {}), sort_keys=False))
        return path

    def config(self, run: str, **settings) -> MixtureConfig:
        return load(self.write(run, **settings))

    def detected(self, run: str) -> Path:
        return self.folder / run / "detection"


def prepared(config: MixtureConfig) -> tuple[Parts, stages._Generate, stages._Classify]:
    """A detection's parts and its two stages, to be run in this process."""
    run = run_folder(config)
    tokenizer = load_tokenizer(config.model_location(config.model))
    inputs = detect._inputs(run, config) | {"tokenizer": detect.tokenizer_digest(tokenizer)}
    classifier = detect._classifier(run, config, inputs, pytest.fail)
    parts = detect._parts(run, config, inputs, classifier)
    make = functools.partial(TransformersGenerator, sampling(config, tokenizer))
    return (
        parts,
        stages._Generate(parts, make),
        stages._Classify(parts, functools.partial(LinearProbe, classifier)),
    )


def draw_here(config: MixtureConfig, order: Callable[[list[Block]], list[Block]] = list) -> None:
    """Commits every missing part with the two stages called in this process, one block after the other."""
    parts, generate, classify = prepared(config)
    openings = detect._openings(config, parts.missing())
    for block in order(parts.missing()):
        row = {"block": list(block), "openings": json.dumps(openings[block])}
        parts.publish(block, classify(generate(row))["part"])


def content_of(folder: Path) -> dict[str, bytes]:
    """Every committed file under a folder; the log of rates is none."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != forecast.RATES
    }


def stamps_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("iteration-*/part-*.parquet")))


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, and those started by them."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    waiting = [pid]
    while waiting:
        found = children.get(waiting.pop(), [])
        yield from found
        waiting += found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = 240, pause: float = 0.005) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model) -> World:
    return World(tmp_path_factory.mktemp("world"), tiny_model)


@pytest.fixture(scope="session")
def golden(world) -> Path:
    """The detection folder of a run whose parts were drawn one after the other in this process, without Ray."""
    config = world.config("golden")
    draw_here(config)
    detect.detect(config)
    return world.detected("golden")


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.concat(pl.read_parquet(path) for path in sorted(folder.glob("iteration-*/*.parquet")))


# --- what a detection says -------------------------------------------------------------------------------------------


def test_every_requested_sample_is_counted_once(golden):
    rows = rows_of(golden).sort("iteration", "sample")
    assert rows.select("iteration", "sample").rows() == [(t, i) for t in (1, 2) for i in range(204)]
    assert rows["seed"].n_unique() == 408
    report = DetectionReport.read(golden / "detection.json", "")
    counted = [share.mean * report.samples for share in report.shares.values()]
    assert sum(counted) + report.unclassified * report.samples == pytest.approx(408)
    assert report.tokens == rows["tokens"].sum() == rows["token_ids"].list.len().sum()


def test_the_report_averages_the_parts(golden):
    rows, report = rows_of(golden), DetectionReport.read(golden / "detection.json", "")
    assert list(report.distribution) == list(report.shares) == list(WORDS)
    assert sum(report.distribution.values()) == pytest.approx(1, abs=1e-12)
    for domain, share in report.shares.items():
        column = rows[f"p_{domain}"]
        means = [column.filter(rows["iteration"] == t).mean() for t in (1, 2)]
        assert share.mean == pytest.approx(sum(means) / 2)
        assert report.distribution[domain] == pytest.approx(share.mean / (1 - report.unclassified))
        assert share.standard_error == pytest.approx(column.std() / 408**0.5, rel=0.15)
        assert share.spread == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
        assert (share.high - share.low) / 2 == pytest.approx(1.96 * share.standard_error, rel=0.15)
    assert sum(share.mean for share in report.corrected.values()) == pytest.approx(1)
    assert report.paper_tokens == round(report.tokens / 408 * 200_000)


def test_the_report_records_what_it_was_made_from(golden, world, tiny_model):
    report = DetectionReport.read(golden / "detection.json", "")
    assert report.start_token == "<|endoftext|>"
    assert report.classifier.accuracy > 0.9
    assert report.inputs["model"] == {"name": str(tiny_model), "revision": None}
    assert report.inputs["seed"] == 7
    assert report.inputs["domains"] == list(WORDS)
    assert report.inputs["sampling"] == {
        **SIZES,
        "stop_at_margin": None,
        "control": 0,
        "opening": 8,
        "start_token": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "repetition_penalty": 1.0,
    }
    for domain in WORDS:
        assert report.inputs["pools"][domain] == pool.open_pool(world.folder / "pool" / domain).manifest.fingerprint()
    assert len(report.inputs["tokenizer"]) == 64


def test_parts_hold_what_their_schema_says(golden, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    for path in golden.glob("iteration-*/*.parquet"):
        table = pq.read_table(path)
        assert table.schema.equals(schema_of(tuple(WORDS)))
        for row in table.to_pylist():
            assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
            assert row["finish_reason"] == ("length" if row["tokens"] == 16 else "stop")
            assert row["unclassified"] == blank(row["text"])


def test_a_rerun_commits_nothing_and_loads_neither_torch_nor_ray(golden, world):
    before = stamps_of(golden)
    code = (
        "import sys\nfrom vtmix.config import load\nfrom vtmix.detect import detect\n"
        f"print(detect(load({str(world.folder / 'golden.yaml')!r})).samples)\n"
        "print({'torch', 'ray', 'transformers', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["408", "set()"]
    assert stamps_of(golden) == before


def test_a_detection_stops_at_the_margin_and_leaves_what_comes_after_it(golden, world, monkeypatch):
    monkeypatch.setattr(estimate, "FEWEST", 16)
    path = world.write("early", stop_at_margin=0.08)
    config = load(path)
    draw_here(config, order=lambda blocks: blocks[::-1])  # more than it needs, and in another order
    report = detect.detect(config)
    assert 16 <= report.samples < 408
    rows = rows_of(golden).filter(pl.col("sample") < report.samples // 2)
    assert len(rows) == report.samples
    for domain, share in report.shares.items():
        column = rows[f"p_{domain}"]
        assert share.mean == pytest.approx(column.mean())
        assert 1.96 * column.std(ddof=0) / report.samples**0.5 <= 0.08
    assert report.paper_tokens == round(report.tokens / report.samples * 200_000)
    assert parts_in(world.detected("early")) == BLOCKS


def test_nothing_is_drawn_after_the_margin_is_met(world, ray_cluster, monkeypatch):
    monkeypatch.setattr(estimate, "FEWEST", 16)
    report = detect.detect(world.config("early-drawn", stop_at_margin=0.08, control=4))
    drawn = rows_of(world.detected("early-drawn")).filter(pl.col("iteration") > 0)
    assert 16 <= report.samples <= len(drawn) < 408
    assert report.control.heldout_texts == 4 * len(WORDS)


def test_what_is_missing_is_found_before_a_judge_is_asked(world):
    nobody = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    config = world.config("unasked", engine={"kind": "vllm", "python": "absent/bin/python"}, classifier=nobody)
    with pytest.raises(ConfigError, match="no interpreter at"):
        detect.detect(config)
    with pytest.raises(DetectionError, match="has no text of 60 tokens that the control group could continue"):
        detect.detect(world.config("unasked", max_tokens=61, control=4, opening=60, classifier=nobody))


def test_a_domain_without_texts_to_measure_a_judge_with_is_named(world, monkeypatch):
    monkeypatch.setattr(pool, "texts", lambda folder: [] if folder.name == "law" else ["a text"])
    with pytest.raises(DetectionError, match="'law': no text to measure the judge with"):
        detect.detect(
            world.config("no-texts", classifier={"kind": "endpoint", "url": "http://127.0.0.1:9", "model": "m"})
        )


def test_a_judge_that_knows_not_even_the_domains_own_texts_is_refused(world):
    silent, knowing = np.array([[0.0, 0.0, 0.1, 0.9]] * 4), np.array([[0.2, 0.2, 0.2, 0.4]] * 4)
    config = world.config("silent-judge", max_unclassified=0.5)
    detect._refuse_silent_judge(dict.fromkeys(WORDS, knowing), config)
    with pytest.raises(DetectionError, match=r"leaves 90\.0% of the domains' own texts unclassified"):
        detect._refuse_silent_judge(dict.fromkeys(WORDS, silent), config)


def test_arguments_that_may_change_what_an_engine_says_are_inputs(world):
    def inputs(**arguments):
        config = world.config("shaped", engine={"kind": "vllm", "python": "p", "arguments": arguments})
        return detect._inputs(run_folder(config), config)["engine"]

    assert inputs(gpu_memory_utilization=0.5, max_num_seqs=4) == inputs()
    assert inputs(quantization="fp8", max_num_seqs=4) == inputs() | {"arguments": {"quantization": "fp8"}}


def test_the_control_group_measures_the_classifier_on_the_models_own_writing(world, tiny_model):
    config = world.config("control", samples=16, iterations=1, control=12, correct=True)
    draw_here(config, order=lambda blocks: blocks[::-1])
    report = detect.detect(config)
    folder = world.detected("control")
    rows = rows_of(folder).filter(pl.col("iteration") == 0).sort("sample")
    assert (report.samples, len(rows), report.control.heldout_texts) == (16, 36, 36)
    tokenizer = load_tokenizer(str(tiny_model))
    for number, domain in enumerate(WORDS):
        texts = pool.texts(world.folder / "pool" / domain)
        written = rows.filter(pl.col("sample") // 12 == number)
        for row, text in zip(written.iter_rows(named=True), texts, strict=False):
            assert row["token_ids"][:8] == tokenizer(text, add_special_tokens=False).input_ids[:8]
            assert 8 <= row["tokens"] <= 16
        for other, share in report.control.confusion[domain].items():
            column = other if other == "unclassified" else f"p_{other}"
            assert share == pytest.approx(written[column].mean())
    assert report.distribution == pytest.approx({name: share.mean for name, share in report.corrected.items()})
    assert report.knowledge == "detected, corrected"
    assert not any("[0/" in line for line in show.show(folder, list(WORDS), 20))


def test_samples_are_shown_by_domain_with_their_probabilities_and_move_no_cursor(golden, world):
    lines = list(show.show(golden, list(WORDS), 2))
    headings = [line for line in lines if not line.startswith(" ")]
    assert [line.split(":")[0] for line in headings] == [*WORDS, "unclassified"]
    assert sum(int(line.split("of ")[1].split(" ")[0].replace(",", "")) for line in headings) == 408
    for line in lines:
        assert line.isprintable()
    rows = {f"[{row['iteration']}/{row['sample']}]": row for row in rows_of(golden).iter_rows(named=True)}
    for heading, first in itertools.pairwise(lines):
        if not heading.startswith(" ") and first.startswith("  ["):
            place, name, share = first.split()[:3]
            assert name == heading.split(":")[0]
            row = rows[place]
            assert float(share.rstrip(",")) == pytest.approx(row.get(f"p_{name}", row.get(name)), abs=0.005)
    with pytest.raises(MissingError, match="run `vtmix detect` first"):
        list(show.show(world.folder, list(WORDS), 2))


def test_a_published_distribution_is_taken_as_it_is_and_labelled(world, tmp_path):
    path = world.write("published", published="llama-3-8b")
    with pytest.raises(ConfigError, match="speaks of the domains law, medicine, finance, science, code, other, found"):
        detect.detect(load(path))
    content = yaml.safe_load(path.read_text())
    content["domains"] = {name: {"train": "none.jsonl"} for name in reversed(published.DOMAINS)}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    report = detect.detect(load(path))
    assert report.distribution["code"] == 5552 / 9989
    assert list(report.distribution) == list(reversed(published.DOMAINS))
    assert report.knowledge == "published for llama-3-8b by the paper's authors, not detected"
    assert detect.detect(load(path)) == report
    weights, _ = loop.weigh(load(path), 1)
    assert weights.knowledge == report.knowledge
    assert weights.weights == pytest.approx(report.distribution)


def test_published_counts_are_about_ten_thousand_each():
    for name, counts in published.COUNTS.items():
        assert len(counts) == len(published.DOMAINS), name
        assert 8_000 < sum(counts) < 10_000, name


def test_the_order_of_blocks_does_not_matter(golden, world):
    config = world.config("reversed")
    draw_here(config, order=lambda blocks: blocks[::-1])
    detect.detect(config)
    assert content_of(world.detected("reversed")) == content_of(golden)


def test_execution_settings_are_no_inputs(golden, world):
    shutil.copytree(golden.parent, world.folder / "elsewhere")
    config = world.config("elsewhere", generate={"actors": 8, "cpus": 2}, classify={"cpus": 1}, device="cpu")
    assert detect.detect(config).samples == 408


# --- whatever dies ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def orphan(world) -> Path:
    """The mixture.yaml of a run whose driver was killed when a few parts stood."""
    folder = world.detected("killed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, ROOT / "jobs" / "detect.py", "--config", world.write("killed")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        try:
            wait_until(lambda: parts_in(folder) >= 2)
        finally:
            started = list(descendants(driver.pid))
            driver.kill()
    wait_until(lambda: not any(title(pid).startswith("ray::MapWorker") for pid in started), seconds=60)
    for pid in started:  # Ray's two agents take a minute to notice
        if title(pid).startswith("ray::"):
            os.kill(pid, signal.SIGKILL)
    return world.write("killed", generate={"actors": 2})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_and_killed_workers_change_nothing(golden, world, orphan, ray_cluster):
    folder = world.detected("killed")
    # What the killed driver was about to publish may stand there too, under a hidden name.
    survivors = {path: stamp for path, stamp in stamps_of(folder).items() if Path(path).name.startswith("part-")}
    assert 2 <= len(survivors) == parts_in(folder) < BLOCKS
    (folder / "iteration-01" / ".part-00001.parquet.x1y2").write_bytes(b"torn")
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.extend(kill_workers(folder, parts_in(folder))))
    killer.start()
    detect.detect(load(orphan))
    killer.join()
    assert len(killed) == KILLS
    assert content_of(folder) == content_of(golden)
    assert survivors.items() <= stamps_of(folder).items()
    assert not list(folder.rglob(".part-*"))


def kill_workers(folder: Path, parts: int) -> list[int]:
    """Kills a random worker of either stage whenever a few more parts stand; those killed while parts were missing."""
    rng = random.Random(5)
    killed: list[int] = []
    while len(killed) < KILLS and parts < BLOCKS:
        wait_until(lambda stand=parts: parts_in(folder) > stand)
        workers = [pid for pid in descendants(os.getpid()) if pid not in killed and "MapWorker(Map(_" in title(pid)]
        if workers and parts_in(folder) < BLOCKS:
            killed.append(rng.choice(workers))
            os.kill(killed[-1], signal.SIGKILL)
        parts = parts_in(folder) + 2
    return killed


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(world, tiny_model, tmp_path, ray_cluster):
    hollow = shutil.copytree(tiny_model, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DetectionError) as error:
        detect.detect(world.config("hollow", model=hollow))
    assert "\n" not in str(error.value)
    assert f"sampling stopped: model: cannot load '{hollow}': Error no file named" in str(error.value)
    assert "what is committed is kept, a rerun goes on from there" in str(error.value)


# --- what is not this detection's ------------------------------------------------------------------------------------


def test_parts_of_other_inputs_are_refused_by_name(golden, world):
    config = world.config("foreign", max_tokens=24)
    place = world.detected("foreign") / "iteration-01"
    place.mkdir(parents=True)
    shutil.copy(golden / "iteration-01" / "part-00000.parquet", place)
    with pytest.raises(ConflictError, match=r"part-00000\.parquet: .*inputs\.sampling\.max_tokens was 16, is now 24"):
        detect.detect(config)
    assert not (world.detected("foreign") / "detection.json").exists()


def test_a_detection_of_other_inputs_is_refused(golden, world):
    shutil.copytree(golden.parent, world.folder / "changed")
    with pytest.raises(ConflictError, match=r"sampling\.samples was 204, is now 100"):
        detect.detect(world.config("changed", samples=100))


def copied(golden: Path, world: World, run: str) -> tuple[MixtureConfig, Path]:
    """A run with all the parts of the golden one, but no report."""
    shutil.copytree(golden.parent, world.folder / run)
    (world.detected(run) / "detection.json").unlink()
    return world.config(run), world.detected(run)


def test_a_part_that_stands_twice_or_beyond_is_refused_by_name(golden, world):
    config, folder = copied(golden, world, "twice")
    shutil.copy(folder / "iteration-01" / "part-00000.parquet", folder / "iteration-01" / "part-00003.parquet")
    shutil.copytree(folder / "iteration-02", folder / "iteration-03")
    with pytest.raises(ConflictError) as error:
        detect.detect(config)
    assert "iteration-01/part-00003.parquet: part was 0, is now 3" in str(error.value)
    assert "iteration-03/part-00000.parquet: no such part belongs to this detection" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 4000])
def test_parts_that_are_not_parquet_are_named(golden, world, data):
    config, folder = copied(golden, world, f"damaged-{len(data)}")
    for name in ("iteration-01/part-00002.parquet", "iteration-02/part-00001.parquet"):
        (folder / name).write_bytes(data)
    with pytest.raises(DamageError) as error:
        detect.detect(config)
    assert "2 parts" in str(error.value)
    assert "iteration-01/part-00002.parquet" in str(error.value)
    assert "iteration-02/part-00001.parquet" in str(error.value)


def test_a_flipped_byte_is_found_or_changes_nothing(golden, world):
    config, folder = copied(golden, world, "flipped")
    parts, _, _ = prepared(config)
    parts = dataclasses.replace(parts, folder=folder / "one", blocks=parts.blocks[:1])
    data = (folder / parts.blocks[0].name).read_bytes()
    parts.publish(parts.blocks[0], data)
    (whole,) = parts.read(parts.blocks)
    path = parts.folder / parts.blocks[0].name
    found = 0
    for place in range(4, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        refusal = refused(parts)
        if refusal is None:
            assert parts.read(parts.blocks)[0].equals(whole)
        else:
            assert "iteration-01/part-00000.parquet" in refusal
            found += 1
    assert found > len(range(4, len(data), 37)) / 2


def refused(parts: Parts) -> str | None:
    """What is said against the parts, if anything."""
    try:
        parts.missing()
        parts.read(parts.blocks)
    except (DamageError, ConflictError) as error:
        return str(error)
    return None


def test_a_hand_written_distribution_is_taken_as_it_is(world):
    folder = world.folder / "by-hand" / "detection"
    folder.mkdir(parents=True)
    shares = {"law": 0.5, "medicine": 0.25, "code": 0.25}
    (folder / "detection.json").write_text(json.dumps({"distribution": shares}))
    assert detect.detect(world.config("by-hand")).distribution == shares


def test_pools_come_first(world):
    path = world.write("poolless")
    path.write_text(path.read_text().replace("folder: pool", "folder: absent"))
    with pytest.raises(MissingError, match="run `vtmix pool` first"):
        detect.detect(load(path))
    assert not (world.folder / "poolless").exists()


def test_two_detections_do_not_work_in_one_folder(world):
    config = world.config("busy")
    with commit.lock(world.detected("busy"), "detection"), pytest.raises(LockedError, match=str(os.getpid())):
        detect.detect(config)


# --- unclassified mass -----------------------------------------------------------------------------------------------


def test_a_silent_model_is_refused_and_its_samples_are_kept(world, tiny_model, tmp_path):
    model = altered(tiny_model, tmp_path / "silent", silent)
    config = world.config("silent", model=model, samples=16, iterations=1)
    draw_here(config)
    with pytest.raises(DetectionError, match=r"100\.0% of the mass of 16 samples .* allows 20\.0%.*start_token"):
        detect.detect(config)
    folder = world.detected("silent")
    assert rows_of(folder).select("text", "tokens", "unclassified").rows() == [("", 0, 1.0)] * 16
    assert not (folder / "detection.json").exists()
    with pytest.raises(DetectionError, match="none of the samples was classified"):
        detect.detect(world.config("silent", model=model, samples=16, iterations=1, max_unclassified=1.0))


def test_odd_generations_are_counted_and_the_rest_is_renormalised(world):
    config = world.config("odd", samples=8, iterations=1, max_unclassified=0.1)
    parts, _, classify = prepared(config)
    texts = ["court statute", "", "\ufffd" * 9, "def class " * 20_000, "\x00", " \n", "patient dose", "🙂"]
    samples = [[text, [3] * min(len(text), 10_000), "length"] for text in texts]
    (block,) = parts.blocks
    parts.publish(block, classify({"block": list(block), "samples": json.dumps(samples), "generating": 0.0})["part"])
    with pytest.raises(DetectionError, match=r"50\.0% of the mass"):
        detect.detect(config)
    before = stamps_of(world.detected("odd") / "iteration-01")
    report = detect.detect(world.config("odd", samples=8, iterations=1, max_unclassified=0.6))
    assert stamps_of(world.detected("odd") / "iteration-01") == before
    assert (report.samples, report.unclassified) == (8, 0.5)
    assert sum(share.mean for share in report.shares.values()) == pytest.approx(0.5)
    assert sum(report.distribution.values()) == pytest.approx(1)
    assert rows_of(world.detected("odd"))["text"].to_list() == texts
    with pytest.raises(DetectionError, match="50"):
        detect.detect(config)


def test_a_judge_behind_an_endpoint_gives_shares_and_its_key_is_written_nowhere(world, ray_cluster):
    import ray

    with Server(lambda prompt, number: (200, chat({"A": 0.5, "B": 0.25}))) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "key": "NODES_KEY", "heldout": 5}
        report = detect.detect(
            world.config("endpoint", classifier=judge, samples=16, iterations=1, max_unclassified=0.9)
        )
    law, medicine, code = (report.shares[name].mean for name in ("law", "medicine", "code"))
    assert law == pytest.approx(2 * medicine)
    assert (law > 0.25, code) == (True, 0)
    assert law + medicine + report.unclassified == pytest.approx(1)
    assert report.classifier.heldout_texts == 15
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {NODES_KEY}"}

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for folder in (world.folder, session.parent) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "detection.json" and "endpoint" in path.parts for path in files)
    assert any("worker" in path.name and session in path.parents for path in files)
    assert [path for path in files if NODES_KEY.encode() in path.read_bytes()] == []


def test_samples_are_neither_lost_nor_invented_between_the_stages(golden, world):
    config = world.config("golden")
    parts, generate, classify = prepared(config)
    block = parts.blocks[3]
    row = generate({"block": list(block), "openings": "[]"})
    drawn = [Sample(text, tuple(ids), reason) for text, ids, reason in json.loads(row["samples"])]
    assert drawn == generate._work(parts.seeds(block))
    assert (golden / block.name).read_bytes() == classify(row)["part"]
