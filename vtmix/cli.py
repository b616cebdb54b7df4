"""`vtmix …`: one command per stage. Each says what it read and what it committed; run again, it changes nothing."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtmix.errors import ConfigError, MissingError, VtmixError

if TYPE_CHECKING:
    from rich.table import Table

    from vtmix.artifacts import PoolManifest, RunFolder
    from vtmix.forecast import Size
    from vtmix.settings import MixtureConfig

app = typer.Typer(
    name="vtmix",
    help="Domain mixtures for fine-tuning that follow what the model knows (VersaTune, arXiv 2411.11266).\n\n"
    "Every command reads ./mixture.yaml, or the file given with --config. Begin with `vtmix init`, then `vtmix run`; "
    "or run the stages one by one, in the order they are listed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str | None, typer.Option("--config", help="The configuration. Default: ./mixture.yaml")]
Run = Annotated[str | None, typer.Option("--run", help="The run folder, instead of the configuration's.")]
Epoch = Annotated[int, typer.Option("--epoch", min=1, help="The epoch, from 1.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Workers. Default: one per core.")]


def say(text: str) -> None:
    """Prints a line of results."""
    typer.echo(text)


def load(config: str | None, run: str | None) -> tuple["MixtureConfig", "RunFolder"]:
    """The configuration and its run folder."""
    from vtmix.artifacts import run_folder
    from vtmix.config import load as load_config

    settings = load_config(config, run)
    return settings, run_folder(settings)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("mixture.yaml"),
) -> None:
    """Write a commented mixture.yaml to start from."""
    from importlib.resources import files

    if path.exists():
        raise ConfigError(f"{path}: exists: give another name, or move it away")
    path.write_text((files("vtmix") / "template.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    say(f"wrote {path}: name your model and your data in it, then `vtmix run`")


@app.command()
def pool(config: Config = None, run: Run = None, workers: Workers = None) -> None:
    """Encode every domain's records into its pool, once."""
    settings, folder = load(config, run)
    for name, manifest in _pool(settings, workers).items():
        say(f"{name}: {_pool_line(manifest)}")
    say(f"pools: {folder.pools}")


def _pool(settings: "MixtureConfig", workers: int | None = None) -> dict[str, "PoolManifest"]:
    from vtmix.pooling import build

    return build(settings, workers=workers)


def _pool_line(manifest: "PoolManifest") -> str:
    dropped = {
        "duplicates dropped": manifest.duplicates,
        "rejected": manifest.rejected,
        "cut at max_length": manifest.truncated,
        "dropped as overlong": manifest.overlong_dropped,
        "leaks dropped": manifest.leaks_dropped,
    }
    notes = "".join(f", {count:,} {what}" for what, count in dropped.items() if count)
    return (
        f"{manifest.records:,} records → {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
        f"{manifest.eval.samples:,} held out{notes}"
    )


@app.command()
def detect(
    config: Config = None,
    run: Run = None,
    show: Annotated[
        int | None, typer.Option("--show", min=1, help="Print so many samples per domain; draw none.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print what it takes on 1, 8 and 64 devices; draw none.")
    ] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="For --estimate: of one generating actor. Default: as measured.")
    ] = None,
    texts_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="For --estimate: of one classifying actor. Default: as measured.")
    ] = None,
) -> None:
    """Sample the model and classify what it says: the knowledge distribution."""
    settings, folder = load(config, run)
    if estimate:
        _estimate(settings, folder, tokens_per_second, texts_per_second)
    elif show is not None:
        from vtmix.show import show as show_samples

        domains, published = list(settings.domains), settings.detection.published
        for line in show_samples(folder.detection.parent, domains, show, published):
            say(line)
    else:
        _detect(settings)
        say(f"detection: {folder.detection}")


def _estimate(
    settings: "MixtureConfig", folder: "RunFolder", tokens_per_second: float | None, texts_per_second: float | None
) -> None:
    from vtmix import forecast

    detection = settings.detection
    if tokens_per_second and texts_per_second:
        rates = forecast.Rates("the rates given", tokens_per_second, texts_per_second, 0.0)
    else:
        found = forecast.measured(folder.detection.with_name(forecast.RATES))
        rates = forecast.Rates(
            found.engine, tokens_per_second or found.tokens_per_s, texts_per_second or found.texts_per_s, found.start_s
        )
    for line in forecast.lines(rates, list(_sizes(settings)), block=detection.block):
        say(line)
    if detection.control:
        count = len(settings.domains)
        say(
            f"all but the paper's include the control group: {count * detection.control:,} samples more "
            f"({count} domains x detection.control)"
        )
    if detection.correct:
        say("corrected shares are known to a margin after more samples: how many is up to the classifier's confusion")


def _sizes(settings: "MixtureConfig") -> Iterator["Size"]:
    """The detection as it is set, the paper's, and those that stop at a margin, each with its control group."""
    from vtmix import forecast
    from vtmix.estimate import samples_needed

    detection = settings.detection
    whole, control = detection.iterations * detection.samples, len(settings.domains) * detection.control
    own = f"{detection.iterations} x {detection.samples:,} samples of {detection.max_tokens} tokens"
    yield forecast.Size(own, whole + control, detection.max_tokens)
    yield forecast.PAPER
    for margin in [detection.stop_at_margin] if detection.stop_at_margin else [0.01, 0.005]:
        needed = forecast.whole_rounds(samples_needed(margin), iterations=detection.iterations, block=detection.block)
        most = min(needed, whole)
        name = f"stop_at_margin {margin:g}: at most {most:,} samples"
        yield forecast.Size(name, most + control, detection.max_tokens)


def _detect(settings: "MixtureConfig") -> None:
    from vtmix.detect import detect as run_detection

    report = run_detection(settings)
    for name, share in report.distribution.items():
        raw, mended = report.shares.get(name), report.corrected.get(name)
        margin = f", classified {raw.mean:.4f} ({raw.low:.4f} to {raw.high:.4f})" if raw else ""
        margin += f", corrected {mended.mean:.4f} ({mended.low:.4f} to {mended.high:.4f})" if mended else ""
        say(f"{name}: {share:.4f}{margin}")
    say(f"{report.knowledge or 'written by hand'}")
    if report.samples:
        asked = settings.detection.iterations * settings.detection.samples
        early = f" of {asked:,}, stopped at the margin" if report.samples < asked else ""
        accuracy = (
            f", classifier accuracy {report.classifier.accuracy:.3f} on held-out text" if report.classifier else ""
        )
        say(f"from {report.samples:,} samples{early}, {report.unclassified:.1%} unclassified{accuracy}")


@app.command()
def reference(config: Config = None, run: Run = None) -> None:
    """Fine-tune a reference model per domain: its lowest held-out loss is the mastery ceiling."""
    settings, folder = load(config, run)
    start = time.monotonic()
    _reference(settings)
    say(f"reference losses: {folder.reference} ({time.monotonic() - start:,.1f} s)")


def _reference(settings: "MixtureConfig") -> None:
    from vtmix.reference import build, summary

    for line in summary(build(settings)):
        say(line)


@app.command()
def weights(epoch: Epoch, config: Config = None, run: Run = None) -> None:
    """Commit an epoch's weights from the detection (epoch 1) or from the losses of the epoch before."""
    from vtmix.loop import weigh

    settings, folder = load(config, run)
    found, fresh = weigh(settings, epoch)
    for name, weight in found.weights.items():
        before = found.terms[name].previous if name in found.terms else None
        say(f"{name}: {weight:.4f}" + (f" (was {before:.4f})" if before is not None else ""))
    for warning in found.warnings:
        say(f"note: {warning}")
    say(f"{_state(fresh)}: {folder.weights(epoch)}")


@app.command()
def explain(epoch: Epoch, config: Config = None, run: Run = None) -> None:
    """Say why each weight of an epoch moved: the terms of the formula, conditions, caps, floors, warnings."""
    from vtmix.artifacts import Weights
    from vtmix.explain import explain as lines

    settings, folder = load(config, run)
    found = Weights.read(folder.weights(epoch), f"run `vtmix weights --epoch {epoch}` first")
    for line in lines(found, settings.weights):
        say(line)


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="A run's folder, or a JSONL file of losses (see the README).")],
    algorithm: Annotated[list[str] | None, typer.Option("--algorithm", help="A rule to try. Repeat for more.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Values of a setting of weights to try: sigma=0.1,0.5. Repeat: all combinations."),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the weights here.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Also draw them here (.svg, .png, .pdf).")] = None,
) -> None:
    """Try rules and settings on recorded losses: the weights each would have given. Trains nothing.

    The losses stay as recorded: what other weights would have made of them, only training can say.
    """
    from vtmix import charts
    from vtmix import replay as replaying

    if chart is not None:
        charts.require_format(chart)
    found = replaying.read(recording)
    tried = replaying.choices(set_ or [])
    results = replaying.replays(found, algorithm or [found.settings.algorithm], tried)
    _print(replaying.table(results))
    if csv is not None:
        csv.write_text(replaying.as_csv(results), encoding="utf-8")
        say(f"wrote {csv}")
    if chart is not None:
        panels = {
            result.title: {name: [at.weights[name] for at in result.weights] for name in found.domains}
            for result in results
        }
        charts.lines(chart, panels, x="epoch", y="weight")
        say(f"wrote {chart}")


@app.command()
def plan(epoch: Epoch, config: Config = None, run: Run = None) -> None:
    """Commit an epoch's counts and positions per domain, and show how they differ from the epoch before."""
    from vtmix.compile import commit_plan, describe, open_pools, planned

    settings, folder = load(config, run)
    found = planned(settings, epoch, open_pools(settings))
    for line in describe(found, settings):
        say(line)
    say(f"{_state(commit_plan(settings, found))}: {folder.plan(epoch)}")


@app.command("compile")
def compile_(
    epoch: Epoch,
    config: Config = None,
    run: Run = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its fingerprint, write nothing.")
    ] = False,
) -> None:
    """Write an epoch's mixture as MDS shards (also `python -m vtmix.compile`)."""
    from vtmix.compile import compile_epoch, describe, open_pools, planned, summarise

    settings, _ = load(config, run)
    if dry_run:
        for line in describe(planned(settings, epoch, open_pools(settings)), settings):
            say(line)
        return
    manifest, fresh = compile_epoch(settings, epoch, workers)
    say(summarise(manifest, settings, fresh=fresh))


@app.command()
def verify(epoch: Epoch, config: Config = None, run: Run = None) -> None:
    """Hold every byte of a mixture against its manifest; names damaged files and samples."""
    from vtmix.compile import open_pools, store_of, where
    from vtmix.errors import DamageError
    from vtmix.verify import read_manifest, verify_store
    from vtmix.verify import verify as find_damage

    settings, folder = load(config, run)
    store = store_of(settings, epoch)
    if store is not None:
        found = verify_store(store, read_manifest(folder.manifest(epoch), epoch))
    else:
        try:
            pools = open_pools(settings)
        except (MissingError, DamageError):
            pools = None  # damaged files are still named, their samples are not
        found = find_damage(folder.mixture(epoch), pools)
    for line in found:
        say(line)
    if found:
        raise DamageError(f"{where(settings, epoch)} is damaged: move it away and compile the epoch again")
    say(f"intact: {where(settings, epoch)}")


@app.command()
def trace(
    sample_id: Annotated[
        str | None, typer.Argument(help="A sample: where it stands. Or give --epoch and --step.")
    ] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=1, help="With --step: an epoch, from 1.")] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="A step of that epoch, from 1: what it saw.")
    ] = None,
    config: Config = None,
    run: Run = None,
) -> None:
    """Say in which epochs, shards and steps a sample is, or which samples a step sees."""
    from vtmix.trace import of_sample, of_step

    if (sample_id is None) == (epoch is None) or (epoch is None) != (step is None):
        raise ConfigError("give either a sample id, or both --epoch and --step")
    settings, _ = load(config, run)
    found = of_sample(settings, sample_id) if sample_id else of_step(settings, epoch or 1, step or 1)
    for seen in found:
        say(
            f"epoch {seen.epoch}, step {seen.step:,} ({seen.run_step:,} of the run): {seen.domain} {seen.sample_id} "
            f"in row {seen.row:,} of {seen.shard}"
        )
    if not found:
        say(f"{sample_id}: in no epoch compiled so far")


@app.command()
def gc(
    config: Config = None,
    run: Run = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed, remove nothing.")] = False,
) -> None:
    """Remove mixtures that no checkpoint needs. Their manifests stay: they can be compiled again, byte-identical."""
    from vtmix.gc import collect

    settings, folder = load(config, run)
    freed = collect(settings, say, dry_run=dry_run)
    say(f"{'would free' if dry_run else 'freed'} {freed / 2**20:,.1f} MiB in {folder.path}")


@app.command()
def run(config: Config = None, run: Run = None) -> None:
    """Run every stage: pools, detection, reference losses, then training with a new mixture each epoch."""
    from vtmix.algorithms import named

    settings, folder = load(config, run)
    with _stage("pools"):
        for name, manifest in _pool(settings).items():
            say(f"{name}: {_pool_line(manifest)}")
    algorithm = named(settings.weights.algorithm)
    if algorithm.detects:
        with _stage("detection"):
            _detect(settings)
    if algorithm.refers:
        with _stage("reference losses"):
            _reference(settings)
    with _stage("training"):
        _train(settings, config, folder)
    _status(settings, folder)


@contextmanager
def _stage(title: str) -> Iterator[None]:
    say(f"── {title}")
    start = time.monotonic()
    yield
    say(f"   {time.monotonic() - start:.1f} s")


def _train(settings: "MixtureConfig", config: str | None, folder: "RunFolder") -> None:
    """Runs the trainer in a process of its own, or several where the configuration says so."""
    from vtmix.config import DEFAULT_PATH

    script = Path(__file__).resolve().parent.parent / "trainers" / "composer_sft.py"
    if not script.is_file():
        raise MissingError(f"the trainer is not at {script}: run vtmix from its checkout, or start your own trainer")
    ranks = settings.training.processes
    launcher = [sys.executable] if ranks == 1 else [str(Path(sys.executable).with_name("composer")), "-n", str(ranks)]
    done = subprocess.run([*launcher, str(script), config or str(DEFAULT_PATH), "--run", str(folder.path)], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


@app.command()
def status(config: Config = None, run: Run = None) -> None:
    """Print per epoch and domain: weight, count, passes, eval loss, learnable potential, forgetting degree."""
    settings, folder = load(config, run)
    _status(settings, folder)


def _status(settings: "MixtureConfig", folder: "RunFolder") -> None:
    from vtmix.status import rows, table

    found = list(rows(folder, list(settings.domains), settings.epochs))
    if not found:
        say(f"{folder.path}: nothing trained yet")
        return
    _print(table(found))
    say(f"everything this run made: {folder.path}")


def _print(found: "Table") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # what a file or a pipe can hold, not the 80 columns rich assumes
    console.print(found)


def _state(fresh: bool) -> str:
    return "committed" if fresh else "up to date"


def main() -> None:
    """The command line: one-line errors, exit code 1 for refusals, 2 for configuration and usage."""
    try:
        app()
    except VtmixError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is committed stays; run again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
