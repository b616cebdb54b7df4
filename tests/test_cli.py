"""The command line teaches, answers at once, and refuses in one line."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vtmix import config, loop
from vtmix.artifacts import DetectionReport, DomainLoss, run_folder
from vtmix.pooling import build
from vtmix.status import rows

VTMIX = Path(sys.executable).with_name("vtmix")
STAGES = ("init", "pool", "detect", "reference", "weights", "explain", "replay", "plan", "compile", "verify")
COMMANDS = (*STAGES, "trace", "gc", "run", "status")


def vtmix(*arguments, cwd=None):
    return subprocess.run([VTMIX, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def begun(project, tmp_path):
    """A run with pools and a detection written by hand."""
    path = project(weights={"algorithm": "constant"})
    settings = config.load(path)
    build(settings)
    DetectionReport(distribution={"law": 0.5, "medicine": 0.3, "code": 0.2}).publish(run_folder(settings).detection)
    return path


def fastest(*arguments):
    """Seconds of work the command takes, whatever else the machine does: the best of three."""

    def spent():
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    def once():
        start = spent()
        assert vtmix(*arguments).returncode == 0
        return spent() - start

    return min(once() for _ in range(3))


def test_help_answers_in_under_a_second():
    assert fastest("--help") < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = vtmix(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5


def test_init_writes_a_configuration_that_is_understood_and_never_overwrites_one(tmp_path):
    assert vtmix("init", cwd=tmp_path).returncode == 0
    content = (tmp_path / "mixture.yaml").read_bytes()
    config.load(tmp_path / "mixture.yaml")
    again = vtmix("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert (tmp_path / "mixture.yaml").read_bytes() == content


def test_a_users_mistake_is_one_line_and_no_traceback(tmp_path):
    done = vtmix("status", "--config", tmp_path / "no.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_stage_that_comes_too_early_names_the_stage_before(project):
    path = project(weights={"algorithm": "constant"})
    assert "run `vtmix pool` first" in vtmix("plan", "--epoch", "1", "--config", path).stderr
    done = vtmix("weights", "--epoch", "1", "--config", path)
    assert done.returncode == 1
    assert "run `vtmix detect` first" in done.stderr


def test_the_stages_one_by_one_say_what_they_committed_and_then_that_they_are_up_to_date(begun):
    folder = begun.parent / "run"
    for command, artefact in (
        ("weights", folder / "weights" / "epoch-0001.json"),
        ("plan", folder / "plan" / "epoch-0001.json"),
        ("compile", folder / "mixture" / "epoch-0001"),
    ):
        first = vtmix(command, "--epoch", "1", "--config", begun)
        assert (first.returncode, "committed: " in first.stdout, str(artefact) in first.stdout) == (0, True, True)
        before = artefact.stat()
        again = vtmix(command, "--epoch", "1", "--config", begun)
        assert (again.returncode, "up to date: " in again.stdout) == (0, True)
        assert (artefact.stat().st_ino, artefact.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert vtmix("verify", "--epoch", "1", "--config", begun).stdout.startswith("intact: ")


def test_verify_names_the_damage_and_exits_with_1(begun):
    assert vtmix("weights", "--epoch", "1", "--config", begun).returncode == 0
    assert vtmix("compile", "--epoch", "1", "--config", begun).returncode == 0
    shard = begun.parent / "run" / "mixture" / "epoch-0001" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = vtmix("verify", "--epoch", "1", "--config", begun)
    assert done.returncode == 1
    assert "(number 47 of the shard) changed" in done.stdout


def test_detect_shows_nothing_and_forecasts_nothing_before_there_is_something(begun):
    shown = vtmix("detect", "--show", "3", "--config", begun)
    assert shown.returncode == 1
    assert "holds no samples yet: run `vtmix detect` first" in shown.stderr
    forecast = vtmix("detect", "--estimate", "--config", begun)
    assert forecast.returncode == 1
    assert "nothing was measured yet" in forecast.stderr


def test_a_published_distribution_has_no_samples_to_show_and_the_way_to_some_is_said(project):
    path = project(detection={"published": "llama-3-8b"})
    shown = vtmix("detect", "--show", "3", "--config", path)
    assert shown.returncode == 1
    assert "holds no samples: the distribution is published for llama-3-8b by the paper's authors" in shown.stderr
    assert "remove detection.published and run `vtmix detect` in another run folder (--run)" in shown.stderr


def test_rates_that_are_given_are_made_into_hours(begun):
    rates = ("--tokens-per-second", "2000", "--texts-per-second", "500")
    done = vtmix("detect", "--estimate", *rates, "--config", begun)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["1", "actor", "8", "actors", "64", "actors"]
    assert lines[2].startswith("2 x 32 samples of 16 tokens ")
    assert lines[3].startswith("the paper's 5 x 40,000 samples of 256 tokens ")
    assert lines[4].startswith("stop_at_margin 0.01: at most 64 samples ")
    assert len(lines) == 6


def test_a_forecast_counts_whole_rounds_and_the_control_group(project):
    detection = {"iterations": 5, "samples": 40_000, "block": 256, "max_tokens": 256, "stop_at_margin": 0.01}
    rates = ("--tokens-per-second", "256", "--texts-per-second", "1e9")  # a sample a second
    without = vtmix("detect", "--estimate", *rates, "--config", project(detection=detection)).stdout.splitlines()
    assert without[4].split()[:5] == ["stop_at_margin", "0.01:", "at", "most", "10,240"]
    assert "2 h 51 min" in without[4]
    detection["control"] = 1200
    done = vtmix("detect", "--estimate", *rates, "--config", project(detection=detection)).stdout.splitlines()
    assert "3 h 51 min" in done[4]
    assert done[3] == without[3]
    assert "2 d 8 h" in done[2]
    assert (
        done[5] == "all but the paper's include the control group: 3,600 samples more (3 domains x detection.control)"
    )


def test_what_a_small_run_measured_is_used_as_the_remedy_says(begun, tmp_path):
    remedy = vtmix("detect", "--estimate", "--config", begun).stderr.strip()
    assert remedy.endswith("then `vtmix detect --estimate --run THAT_FOLDER`")
    small = tmp_path / "small" / "detection"
    small.mkdir(parents=True)
    (small / "rates.jsonl").write_text('{"engine": "x", "tokens_per_s": 64, "texts_per_s": 9e9, "start_s": 0}\n')
    done = vtmix("detect", "--estimate", "--run", tmp_path / "small", "--config", begun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[-6:-4] == ["16", "s"]  # 64 samples of 16 tokens, of which 64 a second


def test_status_shows_every_epoch_that_has_begun(begun):
    settings = config.load(begun)
    losses = {name: DomainLoss(nats=200.0, tokens=100, bytes=400, samples=9) for name in settings.domains}
    loop.begin(settings, losses)
    loop.advance(settings, 1, {**losses, "law": DomainLoss(nats=240.0, tokens=100, bytes=400, samples=9)})
    found = list(rows(run_folder(settings), list(settings.domains), settings.epochs))
    assert [(row.epoch, row.domain) for row in found if row.domain == "law"] == [(0, "law"), (1, "law"), (2, "law")]
    after = found[3]
    assert (after.weight, after.count, after.loss) == (0.5, 24, pytest.approx(2.4))
    assert after.forgetting == pytest.approx(0.2)
    shown = vtmix("status", "--config", begun)
    assert shown.returncode == 0
    assert "2.4000" in shown.stdout


def test_a_config_option_reaches_every_command(project, tmp_path):
    path = project()
    raw = yaml.safe_load(path.read_text())
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**raw, "epochz": 1}))
    for command in ("pool", "detect", "reference", "run", "status"):
        assert "did you mean 'epochs'?" in vtmix(command, "--config", other).stderr
