"""How close detection runs to the engine's own speed, for transformers and vLLM; and what batching is worth to a judge.

    python benchmarks/detect.py [--quick] [--json]

The peer of a detection is its own engine, called directly with all samples in one big batch, in a process of its own
after a warm-up: once before the detection and once after it, since a machine's speed drifts, and the mean counts. The
detection is the whole job: Ray, both stages, committed parts. Its rate is that of the tokens after the first block's
first one; what comes before is start-up, and printed apart. The judge's peer is the same judge asked
one text at a time. The model and the texts are the quickstart's (examples/quickstart/fetch.py); vLLM is left out where
`make vllm-env` has not been run.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import QUICKSTART, ROOT, end, run

from vtmix import classify, config, forecast, generate, pool, stages
from vtmix.artifacts import run_folder
from vtmix.detect import detect
from vtmix.errors import VtmixError
from vtmix.judge import VllmJudge
from vtmix.pooling import build
from vtmix.samples import sample_seed
from vtmix.settings import Judge, MixtureConfig, Vllm

PYTHONS = {"transformers": Path(sys.executable), "vllm": ROOT / ".venv-vllm" / "bin" / "python"}
DOMAINS = ("law", "medicine", "finance", "science", "code", "other")


def prepare(folder: Path, engine: str, options: argparse.Namespace) -> Path:
    """A mixture.yaml for one engine; the pools are shared."""
    if not (QUICKSTART / "model").is_dir():
        raise VtmixError(f"no model in {QUICKSTART}: run `python {QUICKSTART / 'fetch.py'}` first")
    kind: dict[str, Any] = {"kind": engine}
    if engine == "vllm":
        kind["python"] = str(PYTHONS[engine])
    raw = {
        "model": str(QUICKSTART / "model"),
        "run": f"run-{engine}",
        "domains": {name: {"train": str(QUICKSTART / "data" / f"{name}.jsonl")} for name in DOMAINS},
        "pool": {"folder": "pool"},
        "detection": {
            "iterations": 1,
            "samples": options.samples,
            "block": options.block,
            "max_tokens": options.tokens,
            "start_token": "<|endoftext|>",
            "engine": kind,
            "max_unclassified": 1.0,
        },
    }
    path = folder / f"{engine}.yaml"
    path.write_text(json.dumps(raw))  # YAML holds JSON
    return path


def direct(settings: MixtureConfig) -> float:
    """Tokens per second of the engine called with all samples in one batch."""
    engine = settings.detection.engine
    sampling = generate.sampling(settings)
    make: Callable[[], Any] = functools.partial(generate.TransformersGenerator, sampling)
    if isinstance(engine, Vllm):
        make = functools.partial(generate.VllmGenerator, sampling, engine)
    generator = make()
    generator([0, 1])
    seeds = [sample_seed(settings.seed, 1, index) for index in range(settings.detection.samples)]
    start = time.perf_counter()
    samples = generator(seeds)
    return sum(len(sample.token_ids) for sample in samples) / (time.perf_counter() - start)


def judged(settings: MixtureConfig, texts: int) -> tuple[float, float]:
    """Texts per second of a judge given all of them at once, and one after the other."""
    folder, tokens = run_folder(settings), settings.detection.max_tokens
    found = classify.cut({name: pool.texts(folder.pool(name)) for name in DOMAINS}, tokens)
    mixed = [text for group in zip(*found.values(), strict=False) for text in group][:texts]
    judge = VllmJudge(
        Judge(kind="judge", python=sys.executable),
        str(QUICKSTART / "model"),
        None,
        "bf16",
        DOMAINS,
        tokens * classify.CHARACTERS_PER_TOKEN,
    )
    judge(mixed[:2])
    few = mixed[: max(1, texts // 8)]
    start = time.perf_counter()
    for text in few:
        judge([text])
    alone = time.perf_counter() - start
    start = time.perf_counter()
    judge(mixed)
    return len(mixed) / (time.perf_counter() - start), len(few) / alone


def in_its_environment(engine: str, *arguments: str) -> Any:
    """What this file prints on its last line when the engine's own interpreter runs it."""
    environment = stages.SPINS | os.environ  # threads that wait as they do in a detection, and by default
    done = subprocess.run(
        [PYTHONS[engine], __file__, *arguments], check=False, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise VtmixError(f"{engine} failed on its own:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: Path, engine: str) -> dict[str, float]:
    """One engine: on its own, through a detection, and on its own again."""
    settings = config.load(path)
    build(settings)
    before = in_its_environment(engine, "--direct", str(path))
    detect(settings)
    after = in_its_environment(engine, "--direct", str(path))
    alone = (before + after) / 2
    log = run_folder(settings).detection.with_name(forecast.RATES).read_text(encoding="utf-8")
    took = json.loads(log.splitlines()[-1])
    rate = took["tokens"] / (took["seconds"] - took["start_s"])
    return {
        "ratio": rate / alone,
        "detect_tokens_per_s": rate,
        "engine_tokens_per_s": alone,
        "engine_drift": after / before,
        "start_s": took["start_s"],
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="a few short samples, transformers alone")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="per sample")
    parser.add_argument("--texts", type=int, default=256, help="for the judge")
    parser.add_argument("--direct", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.direct:
        print(json.dumps(direct(config.load(options.direct))))
        return 0
    if options.judge:
        print(json.dumps(judged(config.load(options.judge), options.texts)))
        return 0
    engines = [engine for engine, python in PYTHONS.items() if python.exists()]
    if options.quick:
        engines, options.samples, options.block, options.tokens = ["transformers"], 64, 32, 16
    figures: dict[str, Any] = {"ratio_transformers": None, "ratio_vllm": None, "judge_ratio": None}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            path = prepare(Path(folder), engine, options)
            found = compare(path, engine)
            figures[f"ratio_{engine}"] = found.pop("ratio")
            figures |= {f"{engine}_{name}": value for name, value in found.items()}
            if engine == "vllm":
                batched, alone = in_its_environment(engine, "--judge", str(path), "--texts", str(options.texts))
                figures |= {
                    "judge_ratio": batched / alone,
                    "judge_texts_per_s": batched,
                    "judge_one_by_one_texts_per_s": alone,
                }
    for name, value in figures.items():
        print(f"  {name:32} {'not run' if value is None else f'{value:12,.3f}'}")
    return end(figures, as_json=options.json)


if __name__ == "__main__":
    run(main)
