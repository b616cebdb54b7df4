"""JSON Schemas of mixture.yaml and every JSON artefact, generated from the models: `python -m vtmix.schemas FOLDER`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vtmix import artifacts
from vtmix.checkpoints import Checkpoint
from vtmix.classify import MeasuredClassifier
from vtmix.probe import FittedProbe
from vtmix.settings import MixtureConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"

ARTEFACTS: dict[str, Any] = {
    "pool": artifacts.PoolManifest,
    "classifier": FittedProbe | MeasuredClassifier,  # a judge is measured, not fitted
    "detection": artifacts.DetectionReport,
    "reference": artifacts.Reference,
    "losses": artifacts.Losses,
    "weights": artifacts.Weights,
    "plan": artifacts.Plan,
    "manifest": artifacts.Manifest,
    "checkpoint": Checkpoint,
}


def schemas() -> Iterator[tuple[str, str]]:
    """File name and content of every schema."""
    models: dict[str, Any] = {"mixture": MixtureConfig, **ARTEFACTS}
    for name, model in models.items():
        mode: Literal["validation", "serialization"] = "validation" if name == "mixture" else "serialization"
        content = {"$schema": DIALECT, **TypeAdapter(model).json_schema(mode=mode)}
        yield f"{name}.schema.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(folder: Path) -> None:
    """Writes every schema into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in schemas():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "schemas"))
