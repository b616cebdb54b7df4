"""How close detection runs to the engine's own speed, for transformers and vLLM; and what batching is worth to a judge.

    python benchmarks/detect.py [--quick] [--json]

The peer of a detection is its own engine, called directly with all samples in one big batch, in a process of its own
after a warm-up. A machine's speed drifts, so they take turns: each detection is held against the mean of the engine
just before it and just after it, and the mean over the rounds counts. The detection is the whole job: Ray, both stages,
committed parts. Its rate is that of the tokens after the first block's first one; what comes before is start-up, and
printed apart. The judge's peer is the same judge asked one text at a time. The model and the texts are the quickstart's
(examples/quickstart/fetch.py); vLLM is left out where `make vllm-env` has not been run.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
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
ENVIRONMENT = stages.SPINS | os.environ
"""An engine on its own has threads that wait as they do in a detection, and by default."""
ANSWER = "tokens per second: "
DOMAINS = ("law", "medicine", "finance", "science", "code", "other")


def prepare(folder: Path, engine: str, options: argparse.Namespace, number: int = 0) -> Path:
    """A mixture.yaml for one engine and round; the pools are shared."""
    if not (QUICKSTART / "model").is_dir():
        raise VtmixError(f"no model in {QUICKSTART}: run `python {QUICKSTART / 'fetch.py'}` first")
    kind: dict[str, Any] = {"kind": engine}
    if engine == "vllm":
        kind["python"] = str(PYTHONS[engine])
    raw = {
        "model": str(QUICKSTART / "model"),
        "run": f"run-{engine}-{number}",
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
    path = folder / f"{engine}-{number}.yaml"
    path.write_text(json.dumps(raw))  # YAML holds JSON
    return path


def serve(settings: MixtureConfig) -> None:
    """Prints, for every line read, the tokens per second of the engine called with all samples in one batch."""
    engine = settings.detection.engine
    sampling = generate.sampling(settings)
    make: Callable[[], Any] = functools.partial(generate.TransformersGenerator, sampling)
    if isinstance(engine, Vllm):
        make = functools.partial(generate.VllmGenerator, sampling, engine)
    generator = make()
    generator([0, 1])
    seeds = [sample_seed(settings.seed, 1, index) for index in range(settings.detection.samples)]
    for _ in sys.stdin:
        start = time.perf_counter()
        samples = generator(seeds)
        tokens = sum(len(sample.token_ids) for sample in samples)
        print(f"{ANSWER}{tokens / (time.perf_counter() - start)}", flush=True)


@contextmanager
def serving(engine: str, path: Path) -> Iterator[Callable[[], float]]:
    """The engine on its own, kept ready in a process of its own; a call gives its tokens per second."""
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [PYTHONS[engine], __file__, "--serve", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=ENVIRONMENT,
        ) as process,
    ):
        asked, answers = process.stdin, process.stdout
        if asked is None or answers is None:
            raise TypeError("Popen was asked for pipes")

        def rate() -> float:
            with suppress(BrokenPipeError):  # its end says why
                asked.write("again\n")
                asked.flush()
            found = next((line for line in answers if line.startswith(ANSWER)), None)
            if found is None:
                said.seek(0)
                raise VtmixError(f"{engine} failed on its own:\n{said.read()[-2000:]}")
            return float(found.removeprefix(ANSWER))

        yield rate


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
    done = subprocess.run(
        [PYTHONS[engine], __file__, *arguments], check=False, capture_output=True, text=True, env=ENVIRONMENT
    )
    if done.returncode:
        raise VtmixError(f"{engine} failed on its own:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def detection(folder: Path, engine: str, number: int, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens per second of a whole detection, and the seconds it took to start."""
    settings = config.load(prepare(folder, engine, options, number))
    build(settings)
    detect(settings)
    log = run_folder(settings).detection.with_name(forecast.RATES).read_text(encoding="utf-8")
    took = json.loads(log.splitlines()[-1])
    return took["tokens"] / (took["seconds"] - took["start_s"]), took["start_s"]


def compare(folder: Path, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine: on its own and through a detection, in turns."""
    with serving(engine, prepare(folder, engine, options)) as alone:
        peers, jobs, starts = [alone()], [], []
        for number in range(1, options.rounds + 1):
            rate, start = detection(folder, engine, number, options)
            jobs.append(rate)
            starts.append(start)
            peers.append(alone())
    ratios = [job / ((peers[i] + peers[i + 1]) / 2) for i, job in enumerate(jobs)]
    return {
        "ratio": fmean(ratios),
        "ratios": ratios,
        "detect_tokens_per_s": jobs,
        "engine_tokens_per_s": peers,
        "start_s": fmean(starts),
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="a few short samples, transformers alone")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32, help="per sample")
    parser.add_argument("--rounds", type=int, default=3, help="detections per engine")
    parser.add_argument("--texts", type=int, default=256, help="for the judge")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(config.load(options.serve))
        return 0
    if options.judge:
        print(json.dumps(judged(config.load(options.judge), options.texts)))
        return 0
    engines = [engine for engine, python in PYTHONS.items() if python.exists()]
    if options.quick:
        engines, options.samples, options.block, options.tokens, options.rounds = ["transformers"], 64, 32, 16, 1
    figures: dict[str, Any] = {"ratio_transformers": None, "ratio_vllm": None, "judge_ratio": None}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            found = compare(Path(folder), engine, options)
            figures[f"ratio_{engine}"] = found.pop("ratio")
            figures |= {f"{engine}_{name}": value for name, value in found.items()}
            if engine == "vllm":
                path = prepare(Path(folder), engine, options)
                batched, alone = in_its_environment(engine, "--judge", str(path), "--texts", str(options.texts))
                figures |= {
                    "judge_ratio": batched / alone,
                    "judge_texts_per_s": batched,
                    "judge_one_by_one_texts_per_s": alone,
                }
    for name, value in figures.items():
        values = value if isinstance(value, list) else [value]
        print(f"  {name:32} " + " ".join("     not run" if one is None else f"{one:12,.3f}" for one in values))
    return end(figures, as_json=options.json)


if __name__ == "__main__":
    run(main)
