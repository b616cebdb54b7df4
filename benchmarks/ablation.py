"""Which rule trains the best model on the same budget? Algorithms × seeds on one base model, from one command.

    python benchmarks/ablation.py [--folder FOLDER] [--quick] [--json]
    python benchmarks/ablation.py --config examples/paper/mixture.yaml --targets law medicine --parallel 1

Every run is a run folder of its own: the same base model, knowledge distribution, reference losses and number of
samples, trained by the Composer trainer under one algorithm. Seeds draw other samples of the pools in another order.
Reported are each domain's eval loss against that of `uniform` with the same seed, with 95 % intervals over seeds
(Student's t); and, for algorithms with target domains, how the loss of the targets and of the others has changed since
the base model, epoch by epoch. Tables and charts are in <folder>/report. Run again, it goes on where it stopped.

Without --config the base is a Llama of 4 million parameters, trained from scratch on documents of six domains in skewed
proportions, so that it knows some domains better than others, and can forget them.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pretraining import TRUTHS, documents, engine, pretrained, sources
from shared import CORPUS, ROOT, end, run

from vtmix import charts, config, distribute, progress
from vtmix.algorithms import ALGORITHMS
from vtmix.artifacts import DetectionReport, Losses, Reference, Weights, run_folder
from vtmix.detect import detect
from vtmix.errors import VtmixError
from vtmix.pooling import build
from vtmix.reference import build as build_reference
from vtmix.settings import MixtureConfig

MULTI = ("uniform", "inverse", "constant", "versatune")
EXPAND = ("single-domain", "expand-uniform", "versatune-expand", "expand-unbounded")
BASELINE = "uniform"

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: a rule, the domain it expands (None: no rule of that kind), a seed, and where it is done."""

    algorithm: str
    target: str | None
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        """The rule and its target."""
        return self.algorithm if self.target is None else f"{self.algorithm} → {self.target}"

    @functools.cached_property
    def config(self) -> MixtureConfig:
        """Its configuration."""
        return config.load(self.folder / "mixture.yaml")

    @functools.cached_property
    def losses(self) -> list[dict[str, float]]:
        """Per epoch from 0, the base model's: each domain's eval loss in nats per token."""
        found = run_folder(self.config)
        return [
            {name: loss.per_token for name, loss in Losses.read(found.losses(epoch), "").domains.items()}
            for epoch in range(self.config.epochs + 1)
        ]

    @functools.cached_property
    def weights(self) -> list[dict[str, float]]:
        """Per epoch from 1: the weights it was trained with."""
        found = run_folder(self.config)
        return [dict(Weights.read(found.weights(epoch), "").weights) for epoch in range(1, self.config.epochs + 1)]


class Compared(NamedTuple):
    """A rule's final loss in a domain over the baseline's with the same seed, less 1, per seed; the domains' `mean`
    likewise, and the `perplexity` of that mean.
    """

    title: str
    domain: str
    values: list[float]


class Change(NamedTuple):
    """After an epoch of an expansion: the relative change of the target's loss since the base model, and the sum of the
    others', per seed. Below 0 is better than the base model.
    """

    algorithm: str
    target: str
    epoch: int
    mine: list[float]
    others: list[float]


def small(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the study on a small model, which is trained here first; the eval texts are not in it."""
    files = sources(options.data)
    texts = {domain: documents(path) for domain, path in files.items()}
    model = pretrained(folder / "model", texts, TRUTHS[0], steps=options.pretraining, tokens=options.tokens)
    return {
        "model": str(model),
        "domains": {
            domain: {"train": str(path), **held_out(folder / "eval" / f"{domain}.jsonl", path, model, options)}
            for domain, path in files.items()
        },
        "epochs": 4,
        "samples_per_epoch": options.samples,
        "encoding": {"template": "plain", "max_length": options.tokens},
        "pool": {"leak": "drop"},
        "detection": {
            "iterations": 4,
            "samples": options.detection,
            "max_tokens": options.tokens,
            "precision": "fp32",
            "engine": engine(),
            "control": options.detection // 2,
            "opening": 3,
            "correct": True,
        },
        "reference": {"epochs": 3, "samples": options.samples, "batch_size": 16, "lr": options.lr},
        "weights": {"sigma": 0.5, "delta": 0.1},
        "training": {
            "batch_size": 16,
            "lr": options.lr,
            "eval_batch_size": 32,
            "keep_checkpoints": 1,
        },
    }


def held_out(target: Path, train: Path, model: Path, options: argparse.Namespace) -> dict[str, str]:
    """The first eval records that fit the context, as a file that every seed evaluates on; nothing without them."""
    from vtmix.encode import load_tokenizer

    source = train.with_name("val.jsonl")
    if not source.exists():
        return {}
    tokenizer = load_tokenizer(str(model), None)
    with source.open(encoding="utf-8") as lines:
        records = ((line, json.loads(line)) for line in lines)
        fitting = (
            line
            for line, found in records
            if len(tokenizer(found["prompt"] + found["response"]).input_ids) < options.tokens
        )
        target.parent.mkdir(exist_ok=True)
        target.write_text("".join(itertools.islice(fitting, options.eval_samples)), encoding="utf-8")
    return {"eval": str(target)}


def prepare(raw: Raw, folder: Path, *, whole_texts: bool) -> tuple[DetectionReport, Reference]:
    """The base model's knowledge distribution and the reference losses, which all runs share, as they do the pools.

    With `whole_texts`, detection has pools of its own, of whole texts: what a small context leaves of a domain is not
    the domain that the model was trained on.
    """
    settings = write(raw, folder / "base", run="run")
    build(settings)
    detecting = settings
    if whole_texts:
        changes = {"encoding": {"template": "plain"}, "pool": {**raw["pool"], "folder": "pool"}}
        detecting = write(raw, folder / "detection", run="run", **changes)
        build(detecting)
    return detect(detecting), build_reference(settings)


def write(raw: Raw, folder: Path, **changes: Any) -> MixtureConfig:
    """A mixture.yaml in a folder of its own; paths stay those of the original."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mixture.yaml"
    text = yaml.safe_dump({**raw, **changes}, sort_keys=False)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return config.load(path)


def absolute(settings: MixtureConfig, pools: Path) -> Raw:
    """A configuration as it can be moved: what it says relative to its own folder made absolute, its pools in one that
    is shared.
    """
    raw: dict[str, Any] = settings.model_dump(mode="json")
    raw["pool"]["folder"] = str(settings.resolve(settings.pool.folder) if settings.pool.folder else pools)
    detection = raw["detection"]
    sources_ = [source for domain in raw["domains"].values() for source in (*domain["train"], *domain["eval"])]
    for part in (raw["model"], raw["reference"]["model"], detection["classifier"].get("model"), *sources_):
        for key in ("name", "path", "dataset"):
            found = isinstance(part, dict) and part.get(key)
            if found and (key == "path" or settings.resolve(found).is_dir()):
                part[key] = str(settings.resolve(found))
    for part in (detection["engine"], detection["classifier"]):
        if part.get("python"):
            part["python"] = str(settings.resolve(part["python"]))
    return raw


def runs(raw: Raw, folder: Path, options: argparse.Namespace) -> list[Run]:
    """Every run of the study, ready to be trained: its configuration, and the detection and reference losses of all."""
    knowledge, reference = prepare(raw, folder, whole_texts=options.config is None)
    found = []
    for seed in range(1, options.seeds + 1):
        for algorithm in options.algorithms:
            targets = options.targets if ALGORITHMS[algorithm].expands else [None]
            for target in targets:
                name = algorithm if target is None else f"{algorithm}-{target}"
                weights = {**raw["weights"], "algorithm": algorithm, "targets": [target] if target else []}
                settings = write(
                    raw,
                    folder / name / f"seed-{seed}",
                    run="run",
                    seed=seed,
                    weights=weights,
                )
                there = run_folder(settings)
                # Made from other inputs than this run's: they stand as if written by hand, and are taken as they are.
                for path, artefact in ((there.detection, knowledge), (there.reference, reference)):
                    if not path.exists():
                        artefact.model_copy(update={"inputs": None}).publish(path)
                found.append(Run(algorithm, target, seed, settings.root))
    return found


def train(work: tuple[Run, str]) -> Run:
    """Trains a run to its end, in a process of its own; one that is done is left.

    Raises VtmixError with the trainer's last words when it fails.
    """
    one, launcher = work
    script = ROOT / "trainers" / "composer_sft.py"
    log = one.folder / "train.log"
    with log.open("a") as file:
        command = [*shlex.split(launcher or sys.executable), str(script), str(one.folder / "mixture.yaml")]
        done = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise VtmixError(f"{one.title}, seed {one.seed} failed: see {log}\n{log.read_text()[-800:]}")
    return one


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval (Student's t); no width for one value."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def against_baseline(found: Sequence[Run]) -> Iterator[Compared]:
    """Every rule in every domain, on average, and in perplexity, where the baseline was run too."""
    final = {(one.title, one.seed): one.losses[-1] for one in found}
    base: dict[int, dict[str, float]] = {seed: losses for (title, seed), losses in final.items() if title == BASELINE}
    for title in dict.fromkeys(title for title, _ in final):
        mine = {seed: losses for (name, seed), losses in final.items() if name == title and seed in base}
        if not mine:
            continue
        for domain in found[0].config.domains:
            yield Compared(title, domain, [losses[domain] / base[seed][domain] - 1 for seed, losses in mine.items()])
        means = [
            (statistics.fmean(losses.values()), statistics.fmean(base[seed].values())) for seed, losses in mine.items()
        ]
        yield Compared(title, "mean", [loss / of_base - 1 for loss, of_base in means])
        yield Compared(title, "perplexity", [math.expm1(loss - of_base) for loss, of_base in means])


def changes(found: Sequence[Run]) -> Iterator[Change]:
    """Every rule with every target after every epoch."""
    expanding = [one for one in found if one.target is not None]
    for algorithm, target in dict.fromkeys((one.algorithm, one.target) for one in expanding):
        curves = [one.losses for one in expanding if (one.algorithm, one.target) == (algorithm, target)]
        for epoch in range(1, len(curves[0])):
            relative = [{name: loss / curve[0][name] - 1 for name, loss in curve[epoch].items()} for curve in curves]
            yield Change(
                algorithm,
                str(target),
                epoch,
                [one[str(target)] for one in relative],
                [math.fsum(value for name, value in one.items() if name != target) for one in relative],
            )


def percent(values: Sequence[float]) -> str:
    """A mean and its interval as percentages."""
    mean, half = interval(values)
    return f"{mean:+.2%}" if math.isnan(half) else f"{mean:+.2%} ± {half:.2%}"


def report(found: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Writes tables and charts; returns the figures."""
    folder.mkdir(exist_ok=True)
    compared, expanded = list(against_baseline(found)), list(changes(found))
    domains = list(found[0].config.domains)
    lines = [*_loss_table(found, domains), "", *_relative_table(compared, domains), "", *_expansion_table(expanded)]
    (folder / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "target", "seed", "epoch", "domain", "weight", "loss", "perplexity"])
        for one in found:
            weights: list[dict[str, Any]] = [dict.fromkeys(domains, ""), *one.weights]
            for epoch, losses in enumerate(one.losses):
                for name, loss in losses.items():
                    row = [one.algorithm, one.target or "", one.seed, epoch, name, weights[epoch][name]]
                    writer.writerow([*row, loss, math.exp(loss)])
    _charts(found, compared, expanded, folder)
    print("\n".join(lines))
    print(f"\ntables and charts: {folder}")
    expansions: dict[str, dict[str, dict[str, list[float]]]] = {}
    for change in expanded:
        curves = expansions.setdefault(change.target, {}).setdefault(change.algorithm, {"target": [], "others": []})
        curves["target"].append(statistics.fmean(change.mine))
        curves["others"].append(statistics.fmean(change.others))
    plain = {one.title for one in found if one.target is None}
    multi = {one.title: statistics.fmean(one.values) for one in compared if one.domain == "mean" and one.title in plain}
    return {"multi": multi, "expand": expansions}


def _loss_table(found: Sequence[Run], domains: Sequence[str]) -> Iterator[str]:
    yield "Eval loss after the last epoch in nats per token, mean over seeds (perplexity of the mean in brackets):"
    yield ""
    yield f"| algorithm | {' | '.join(domains)} | mean |"
    yield f"| --- |{' ---: |' * (len(domains) + 1)}"
    finals: dict[str, list[dict[str, float]]] = {"base model": [one.losses[0] for one in found]}
    for one in found:
        finals.setdefault(one.title, []).append(one.losses[-1])
    for title, losses in finals.items():
        means = [statistics.fmean(loss[name] for loss in losses) for name in domains]
        mean = statistics.fmean(means)
        yield f"| {title} | {' | '.join(f'{value:.4f}' for value in means)} | {mean:.4f} ({math.exp(mean):.2f}) |"


def _relative_table(compared: Sequence[Compared], domains: Sequence[str]) -> Iterator[str]:
    yield f"Loss after the last epoch against `{BASELINE}` with the same seed (below 0: better), with 95 % intervals:"
    yield ""
    columns = [*domains, "mean", "perplexity"]
    yield f"| algorithm | {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    cells = {(title, name): percent(values) for title, name, values in compared}
    for title in dict.fromkeys(title for title, *_ in compared):
        yield f"| {title} | {' | '.join(cells[title, name] for name in columns)} |"


def _expansion_table(expanded: Sequence[Change]) -> Iterator[str]:
    if not expanded:
        return
    yield "Change of loss since the base model: the target's / the sum of the other domains' (below 0: better):"
    yield ""
    epochs = sorted({epoch for _, _, epoch, _, _ in expanded})
    yield f"| target | algorithm | {' | '.join(f'epoch {epoch}' for epoch in epochs)} |"
    yield f"| --- | --- |{' --- |' * len(epochs)}"
    cells = {(t, a, e): f"{percent(mine)} / {percent(others)}" for a, t, e, mine, others in expanded}
    for target, algorithm in dict.fromkeys((t, a) for a, t, *_ in expanded):
        yield f"| {target} | {algorithm} | {' | '.join(cells[target, algorithm, epoch] for epoch in epochs)} |"


def _charts(
    found: Sequence[Run],
    compared: Sequence[Compared],
    expanded: Sequence[Change],
    folder: Path,
) -> None:
    first = [one for one in found if one.seed == found[0].seed]
    panels = {
        one.title: {name: [weights[name] for weights in one.weights] for name in found[0].config.domains}
        for one in first
    }
    charts.lines(folder / "weights.svg", panels, x="epoch", y="weight")
    spokes: dict[str, dict[str, float]] = {}
    plain = {one.title for one in found if one.target is None}
    for title, name, values in compared:
        if title in plain and name in found[0].config.domains:
            spokes.setdefault(title, {})[name] = 1 / (1 + statistics.fmean(values))
    if spokes:
        charts.radar(folder / "radar.svg", spokes, title=f"loss of {BASELINE} / loss (outward is better)")
    moved: dict[str, dict[str, list[float]]] = {}
    for algorithm, target, _, mine, others in expanded:
        for kind, values in ((f"target: {target}", mine), (f"others than {target}, summed", others)):
            moved.setdefault(kind, {}).setdefault(algorithm, [0.0]).append(100 * statistics.fmean(values))
    if moved:
        charts.lines(folder / "expansion.svg", moved, x="epoch", y="change of loss (%)", start=0)


def study(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole study and reports it."""
    settings = config.load(options.config) if options.config else write(small(folder, options), folder)
    raw = absolute(settings, pools=folder / "pool")
    unknown = [name for name in options.targets if name not in raw["domains"]]
    if unknown:
        raise VtmixError(f"--targets {' '.join(unknown)}: the domains are {', '.join(raw['domains'])}")
    planned = runs(raw, folder, options)
    threads = str(max(1, distribute.cores() // options.parallel))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    work = [(one, options.launcher) for one in planned]
    with progress.bar("train", len(work), "runs") as advance:
        for _ in distribute.run(train, work, backend="threads", workers=options.parallel):
            advance(1)
    return report(planned, folder / "report")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="three rules, one seed, few steps: does it run?")
    parser.add_argument("--config", type=Path, help="a mixture.yaml to study instead, with a model of your own")
    parser.add_argument("--folder", type=Path, help="where everything is kept, to go on from (default: nowhere)")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=[*MULTI, *EXPAND], metavar="NAME")
    parser.add_argument("--targets", nargs="+", default=["law", "science"], help="each is expanded in runs of its own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=distribute.cores(), help="runs at a time, sharing the cores")
    parser.add_argument("--launcher", default="", help="what starts the trainer, as in 'composer -n 8'")
    small_model = parser.add_argument_group("the small model (without --config)")
    small_model.add_argument("--data", type=Path, default=CORPUS, help="folder of <domain>/train.jsonl and val.jsonl")
    small_model.add_argument("--pretraining", type=int, default=1200, help="steps of 16 documents")
    small_model.add_argument("--samples", type=int, default=320, help="of an epoch, and of a reference model's")
    small_model.add_argument("--eval-samples", type=int, default=64, help="per domain")
    small_model.add_argument("--detection", type=int, default=1024, help="samples per iteration, of four")
    small_model.add_argument("--tokens", type=int, default=128, help="of a document, at most")
    small_model.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()
    if options.quick:
        options.algorithms, options.targets, options.seeds = ["uniform", "versatune", "versatune-expand"], ["law"], 1
        options.pretraining, options.samples, options.eval_samples, options.detection = 40, 48, 8, 64
        options.tokens = 64
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return end(study(folder, options), as_json=options.json)


if __name__ == "__main__":
    run(main)
