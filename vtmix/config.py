"""Reading mixture.yaml: from a file to settings, or to one message that names everything wrong with it.

Unknown keys are errors that name the nearest known one; every offender is reported at once. `vtmix init` writes a
commented template; schemas/mixture.schema.json completes it in editors.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vtmix.errors import ConfigError, listing
from vtmix.settings import MixtureConfig

DEFAULT_PATH = Path("mixture.yaml")

# Settings that say how the work is carried out, not what comes out: they may change within a run.
EXECUTION_ONLY = frozenset(
    {
        "run",
        "pool.folder",
        "pool.store",
        "detection.device",
        "detection.engine.arguments",
        "detection.engine.python",
        "detection.engine.tensor_parallel",
        "detection.classifier.arguments",
        "detection.classifier.tensor_parallel",
        "detection.classifier.python",
        "detection.classifier.concurrency",
        "detection.classifier.timeout",
        "detection.classifier.retries",
        "detection.classifier.key",
        "detection.generate",
        "detection.classify",
        "mixture.store",
        "reference.device",
        "reference.resources",
        "training.microbatch_size",
        "training.eval_batch_size",
        "training.device",
        "training.fsdp",
        "training.checkpoint_steps",
        "training.keep_checkpoints",
        "training.loggers",
        "training.processes",
    }
)


def load(path: str | Path | None = None, run: str | Path | None = None) -> MixtureConfig:
    """Reads mixture.yaml (default: ./mixture.yaml); `run` overrides the run folder (relative to the working folder).

    Raises ConfigError naming every offending key, what was found and what was expected.
    """
    path = Path(path or DEFAULT_PATH)
    raw = parse(path)
    if run is not None:
        raw["run"] = str(Path(run).absolute())
    return validate(raw, path)


def parse(path: Path) -> dict[str, Any]:
    """The YAML mapping a file holds."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file: run `vtmix init` to write one here, or name yours with --config"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw


def validate(raw: Mapping[str, Any], path: Path) -> MixtureConfig:
    """The configuration a mapping describes; `path` names it in errors and anchors relative paths."""
    try:
        config = MixtureConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(listing(f"{path}: {line}" for line in _describe(error))) from None
    config._root = path.absolute().parent
    return config


def _describe(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part != "[key]")
        if item["type"] == "extra_forbidden":
            yield f"unknown key '{where}'{_nearest(item['loc'])}"
        elif "[key]" in item["loc"]:
            yield (
                f"domain name {item['input']!r} cannot be used: expected 1-32 of a-z, 0-9, _ and -, "
                "starting with a letter, since it names folders"
            )
        elif item["type"] == "missing":
            yield f"'{where}' is missing: it has no default"
        else:
            found = f" (found {item['input']!r})" if not isinstance(item["input"], dict) else ""
            message = item["msg"].removeprefix("Value error, ")
            yield f"{where}: {message}{found}" if where else message


def _nearest(loc: tuple[int | str, ...]) -> str:
    known = _keys_at(loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    return f": did you mean '{close[0]}'?" if close else f": expected one of {', '.join(known)}"


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys the model at `loc` knows: follows annotations down from the root."""
    models: list[Any] = [MixtureConfig]
    for part in loc:
        found: list[Any] = []
        for model in models:
            fields = model.model_fields
            candidates = [fields[str(part)].annotation] if str(part) in fields else [model]
            for candidate in candidates:
                found.extend(_models_in(candidate))
        models = found or models
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def resolved(config: MixtureConfig) -> str:
    """The configuration with every default spelled out, as YAML (no absolute path enters it)."""
    content = config.model_dump(mode="json", exclude={"run"})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, child in value.items()
        for key, leaf in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values differ, each with both, leaving out what only steers execution."""
    old, new = flatten(dict(before)), flatten(dict(after))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        steers = any(key == name or key.startswith(name + ".") for name in EXECUTION_ONLY)
        if not steers and old.get(key) != new.get(key):
            lines.append(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}")
    return lines
