"""The shape of the code is held as design promises it: who imports whom, what loads when, what never appears."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vtmix

PACKAGE = Path(vtmix.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "transformers", "ray", "streaming", "composer", "datasets", "sklearn", "openai", "vllm", "wordllama"}

# Each line may import from the lines above it, and from its own.
LAYERS = [
    {"errors"},
    {"settings"},
    {"config", "commit", "progress", "distribute", "environments", "engine", "published", "forecast", "charts"},
    {"artifacts"},
    {"mds", "packing", "records", "sources", "samples", "cluster", "background", "stores"},
    {"simplex", "signals", "algorithms"},
    {"explain"},
    {
        "encode",
        "weights",
        "plan",
        "overview",
        "pool",
        "staging",
        "batches",
        "checkpoints",
        "estimate",
        "classify",
        "question",
    },
    {
        "ranges",
        "leaks",
        "parts",
        "reduce",
        "assemble",
        "pooling",
        "sequences",
        "shards",
        "generate",
        "probe",
        "judge",
        "stages",
        "trainee",
    },
    {"compile"},
    {"verify", "detect", "reference", "trace", "gc"},
    {"loop", "status", "show", "schemas", "job", "replay"},
    {"cli"},
]


def imports(path):
    """The vtmix modules a file imports anywhere, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "vtmix":
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif node.module.startswith("vtmix."):
            yield node.module.removeprefix("vtmix.")


def test_every_module_has_its_place():
    assert sorted(name for layer in LAYERS for name in layer) == MODULES


def test_imports_follow_the_direction_of_the_design():
    place = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    against = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(PACKAGE / f"{name}.py")
        if place[other] > place[name]
    ]
    assert against == []


def test_no_two_modules_import_each_other():
    reach = {name: set(imports(PACKAGE / f"{name}.py")) - {name} for name in MODULES}
    for _ in MODULES:
        reach = {name: found.union(*(reach[other] for other in found)) for name, found in reach.items()}
    assert [name for name in MODULES if name in reach[name]] == []


def test_no_module_loads_a_heavy_library_when_it_is_imported():
    script = (
        "import importlib, json, sys\n"
        f"found = {{}}\nfor name in {MODULES!r}:\n"
        "    importlib.import_module('vtmix.' + name)\n"
        f"    found[name] = sorted({HEAVY!r} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {name: loaded for name, loaded in json.loads(done.stdout).items() if loaded} == {}


def python_files():
    return [
        path
        for folder in ("vtmix", "jobs", "trainers", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "os.system",
}
FORBIDDEN_ARGUMENTS = {
    ("trust_remote_code", "True"),
    ("weights_only", "False"),
    ("shell", "True"),
    ("allow_unsafe_types", "True"),
}


def test_no_code_path_runs_what_a_data_file_says():
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in FORBIDDEN_CALLS:
                    found.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
                found += [
                    f"{path}:{node.lineno} passes {word.arg}={ast.unparse(word.value)}"
                    for word in node.keywords
                    if (word.arg, ast.unparse(word.value)) in FORBIDDEN_ARGUMENTS
                ]
    assert found == []


def test_library_code_has_no_asserts():
    found = [
        f"{path}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["lock.txt", "quickstart.txt", "vllm-cpu.txt", "vllm.txt"])
def test_lock_files_name_packages_and_versions_only(name):
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        requirement = line.split(";")[0].strip()
        package, _, version = requirement.partition("==")
        assert package, line
        assert version, line
        assert "/" not in line, line
