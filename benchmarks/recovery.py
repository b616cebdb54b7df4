"""Does detection find what a model knows? On models whose knowledge is known, since they were trained here.

    python benchmarks/recovery.py [--quick] [--json] [--data FOLDER]

For each of several skewed mixtures of domains, a small Llama is trained from scratch on documents in exactly those
proportions, each training row one document behind the start token, and then detected like any model. Reported are the
total variation distances between the mixture and the detection, as classified and corrected, the same with the 95 %
intervals of every domain's share, and how many of these intervals hold the truth. What a model that was trained for
minutes writes is only like its training text, so part of the distance is the model's, and part the sampling's.

Rows and samples are short, since that is what such a model can learn: how documents begin. Of longer samples it loses
the thread, and what is left of the domain is too little to tell the domains apart by; the standard errors say so.

A document is drawn from the mixture as a whole, so a sample of a model that has learned how documents begin is a sample
of the domains' openings in the mixture's proportions, continued by the model. That is why the control group's openings
are short here: such a model knows the first few tokens of a document far better than what follows them.

The models are trained side by side, each on one core, which small ones make better use of than of several.
Samples are drawn with vLLM where `make vllm-env` has been run, else with transformers, which takes longer.
The corpus is a folder of <domain>/train.jsonl with prompts and responses, or the quickstart's.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pretraining import TRUTHS, documents, engine, pretrained, sources
from shared import CORPUS, end, run

from vtmix import config
from vtmix.artifacts import DetectionReport
from vtmix.detect import detect
from vtmix.distribute import cores
from vtmix.pooling import build


def trained(
    folder: Path, truths: Sequence[dict[str, float]], files: dict[str, Path], options: argparse.Namespace
) -> list[Path]:
    """A model of every mixture."""
    workers = min(len(truths), cores())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        started = [
            pool.submit(_train, folder / f"model-{number}", truth, files, options)
            for number, truth in enumerate(truths, start=1)
        ]
        return [model.result() for model in started]


def _train(folder: Path, truth: dict[str, float], files: dict[str, Path], options: argparse.Namespace) -> Path:
    import torch

    torch.set_num_threads(1)
    return pretrained(
        folder,
        {domain: documents(path) for domain, path in files.items()},
        truth,
        steps=options.steps,
        batch=options.batch,
        tokens=options.tokens,
        lr=options.lr,
        width=options.width,
        seed=options.seed,
    )


def detected(folder: Path, model: Path, files: dict[str, Path], options: Any) -> DetectionReport:
    """The detection of a model, with a classifier fitted on the corpus."""
    settings = config.validate(
        {
            "model": str(model),
            "run": folder.name,
            "seed": options.seed,
            "domains": {domain: {"train": str(path)} for domain, path in files.items()},
            "pool": {"folder": "pool", "leak": "drop"},
            "encoding": {"template": "plain"},
            "detection": {
                "iterations": 4,
                "samples": -(-options.samples // 4),
                "max_tokens": options.tokens,
                "precision": "fp32",
                "engine": engine(),
                "control": options.control,
                "opening": options.opening,
                "correct": True,
            },
        },
        folder.parent / "mixture.yaml",
    )
    build(settings)
    return detect(settings)


def distance(truth: dict[str, float], found: dict[str, float]) -> float:
    """Total variation distance."""
    return sum(abs(truth[domain] - found[domain]) for domain in truth) / 2


def measured(truth: dict[str, float], report: DetectionReport) -> dict[str, Any]:
    """How far a detection is from the truth, and whether it knows."""
    total = sum(share.mean for share in report.shares.values())
    raw = {domain: share.mean / total for domain, share in report.shares.items()}
    corrected = {domain: share.mean for domain, share in report.corrected.items()}
    for domain, share in report.corrected.items():
        print(
            f"  {domain:<10} truth {truth[domain]:.3f}  as classified {raw[domain]:.3f}  "
            f"corrected {share.mean:.3f} ({share.low:.3f} to {share.high:.3f})"
        )
    held = [share.low <= truth[domain] <= share.high for domain, share in report.corrected.items()]
    return {
        "tv_raw": distance(truth, raw),
        "tv_corrected": distance(truth, corrected),
        "coverage95": sum(held) / len(held),
        "samples": report.samples,
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="one mixture, a few steps: does it run?")
    parser.add_argument("--data", type=Path, default=CORPUS, help="folder of <domain>/train.jsonl")
    parser.add_argument("--folder", type=Path, help="where models and detections are kept (default: nowhere)")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--samples", type=int, default=12_288, help="per mixture")
    parser.add_argument("--control", type=int, default=1536, help="samples per domain that measure the classifier")
    parser.add_argument("--opening", type=int, default=3, help="tokens of a text that each of those continues")
    parser.add_argument("--tokens", type=int, default=48, help="of a training row and of a sample")
    parser.add_argument("--width", type=int, default=192, help="of the models: a multiple of 64")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    truths: tuple[dict[str, float], ...] = TRUTHS
    if options.quick:
        truths, options.steps, options.samples, options.tokens = TRUTHS[:1], 60, 128, 32
        options.control = 16
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        files = sources(options.data)
        start = time.perf_counter()
        models = trained(folder, truths, files, options)
        print(f"{len(models)} models trained in {time.perf_counter() - start:.0f} s")
        for number, (truth, model) in enumerate(zip(truths, models, strict=True), start=1):
            print(f"mixture {number} of {len(truths)}")
            start = time.perf_counter()
            found = measured(truth, detected(folder / f"run-{number}", model, files, options))
            figures.append(found | {"detect_s": time.perf_counter() - start})
            print("  " + ", ".join(f"{name} {value:.4g}" for name, value in figures[-1].items()))
    return end({name: [found[name] for found in figures] for name in figures[0]}, as_json=options.json)


if __name__ == "__main__":
    run(main)
