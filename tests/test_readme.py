"""Every command in the README is executed, and every promise in its table names a test that exists."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

# Executed elsewhere than in the test below, each where its setting is.
ELSEWHERE = {
    "make demo": "test_make_demo_runs_the_whole_loop",
    "make test": "this suite is what it runs",
    "make vllm-env": "`make test` builds it, and test_vllm.py runs what it holds",
    "python jobs/pool.py": "test_pool_ray.py",
    "python jobs/compile.py --epoch 1": "test_ray_jobs.py",
    "vtmix init": "test_init_writes_a_configuration_that_is_understood_and_never_overwrites_one",
    'ray job submit --working-dir . -- python jobs/detect.py --config "$PWD/mixture.yaml"': "test_ray_jobs.py",
}
# In this order: the whole run, then each stage of it again, which finds its work done.
IN_A_PROJECT = [
    "vtmix pool",
    "python jobs/detect.py",
    "python jobs/reference.py",
    "composer -n 8 trainers/composer_sft.py mixture.yaml",
    "vtmix run",
    "vtmix detect",
    "vtmix detect --show 5",
    "vtmix detect --estimate",
    "vtmix reference",
    "vtmix weights --epoch 1",
    "vtmix explain --epoch 1",
    "vtmix plan --epoch 1",
    "vtmix compile --epoch 1",
    "vtmix verify --epoch 1",
    "vtmix trace --epoch 1 --step 1",
    "vtmix status",
    "vtmix replay run --algorithm versatune --set sigma=0.1,0.5,1 --csv weights.csv --chart weights.svg",
    "vtmix gc",
]


def commands():
    """The lines of the README's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def shell(command, folder, seconds):
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_known_here():
    assert sorted(commands()) == sorted([*ELSEWHERE, *IN_A_PROJECT])


@pytest.mark.timeout(600)
def test_the_commands_for_ones_own_data_work_one_after_the_other(project, tmp_path):
    project(epochs=2, samples_per_epoch=16, reference={"epochs": 1, "samples": 8}, detection={"iterations": 1})
    for folder in ("jobs", "trainers"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # Two ranks instead of eight: they share one machine's cores here.
    said = {command: shell(command.replace("-n 8", "-n 2"), tmp_path, 400) for command in IN_A_PROJECT}
    assert "potential" in said["vtmix run"]
    assert "up to date" in said["vtmix compile --epoch 1"]
    assert "intact" in said["vtmix verify --epoch 1"]
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_loop_in_the_readme_is_the_loop_of_the_code(project):
    block = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    from vtmix import config, loop
    from vtmix.artifacts import DetectionReport, DomainLoss, run_folder
    from vtmix.pooling import build

    settings = config.load(project(weights={"algorithm": "constant"}))
    build(settings)
    DetectionReport(distribution={"law": 0.5, "medicine": 0.3, "code": 0.2}).publish(run_folder(settings).detection)
    losses = {name: DomainLoss(nats=200.0, tokens=100, bytes=400, samples=9) for name in settings.domains}
    code = block[1].replace('"mixture.yaml"', repr(str(settings.root / "mixture.yaml")))
    names = {"base_losses": losses, "losses": losses}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mixture"] is None
    assert loop.losses_of(settings, settings.epochs) is not None


def test_the_settings_in_the_readme_are_settings(tmp_path):
    import yaml

    from vtmix import config

    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        raw = {"model": "m", "domains": {name: {"train": "-"} for name in ("law", "code")}, **yaml.safe_load(block)}
        config.validate(raw, tmp_path / "mixture.yaml")


def test_the_recording_in_the_readme_is_one(tmp_path):
    from vtmix import replay

    block = re.search(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    (tmp_path / "losses.jsonl").write_text(block[1])
    (found,) = replay.replays(replay.read(tmp_path / "losses.jsonl"), ["versatune"], {})
    assert [weights.epoch for weights in found.weights] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_demo_runs_the_whole_loop():
    said = shell("make demo", ROOT, 1400)
    assert re.search(r"^│ +3 │ other +│ +0\.\d{4} │", said, re.MULTILINE), said
    run = ROOT / "examples" / "quickstart" / "run"
    assert str(run) in said
    for name in ("detection/detection.json", "weights/epoch-0003.json", "losses/epoch-0003.json", "model/config.json"):
        assert (run / name).is_file()


def test_every_promise_in_the_table_is_held_by_a_test_that_exists():
    known = {
        f"{path.name}::{node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    named = re.findall(r"`(test_\w+\.py::test_\w+)`", README)
    assert len(named) >= 15
    assert [name for name in named if name not in known] == []
