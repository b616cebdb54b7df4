"""What the weights would have been: any rule, run again over losses that were recorded. Nothing is trained.

A recording is the folder of a run, or a JSONL file of losses in one unit, one epoch per line (0: the base model). The
knowledge distribution, the reference losses and the pools' sizes stand in a line each, or in one, where a rule asks
for them:

    {"knowledge": {"law": 0.2, "code": 0.8}, "reference": {"law": 1.9, "code": 1.1}, "sizes": {"law": 900, "code": 400}}
    {"epoch": 1, "losses": {"law": 2.5, "code": 1.4}}

The losses stay as they were recorded. What other weights would have made of them, only training can say.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator
from rich.table import Table

from vtmix import config as configuration
from vtmix.algorithms import Situation, Trained, named
from vtmix.artifacts import DetectionReport, Losses, Plan, Reference, RunFolder, Weights
from vtmix.errors import ConfigError, MissingError, RecordError, listing
from vtmix.settings import DomainName, Model, WeightsSettings
from vtmix.signals import Signal, make_signals, unit_of
from vtmix.weights import make_weights

Loss = Annotated[float, Field(ge=0)]


class Line(Model):
    """One line of a recording."""

    epoch: Annotated[int | None, Field(ge=0)] = None
    losses: dict[DomainName, Loss] | None = None
    knowledge: dict[DomainName, Annotated[float, Field(ge=0)]] | None = None
    reference: dict[DomainName, Loss] | None = None
    sizes: dict[DomainName, Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _losses_have_an_epoch(self) -> "Line":
        if (self.epoch is None) != (self.losses is None):
            raise ValueError("'epoch' and 'losses' come together")
        return self


@dataclass(frozen=True)
class Recording:
    """The signals of every recorded epoch, and what rules start from; epochs are consecutive, from 0 or 1."""

    domains: tuple[str, ...]
    signals: Mapping[int, Mapping[str, Signal]]
    settings: WeightsSettings
    """What the run was made with; the defaults for a file."""
    knowledge: Mapping[str, float] | None = None
    sizes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Replay:
    """One rule with one choice of its settings, and the weights it gives for every epoch from 1 to after the last."""

    algorithm: str
    choice: Mapping[str, Any]
    weights: Sequence[Weights]

    @property
    def title(self) -> str:
        """The rule and its choice, in a line."""
        return " ".join([self.algorithm, *(f"{name}={_shown(value)}" for name, value in self.choice.items())])


def read(path: Path) -> Recording:
    """A recording, from a run's folder or a JSONL file.

    Raises MissingError when there is none, RecordError naming the line that does not hold what a recording holds.
    """
    if path.is_dir():
        return _of_run(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file: give a run folder, or a JSONL file of losses") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 (byte {error.start})") from None
    return _of_lines(path, {number: _line(path, number, text) for number, text in enumerate(lines, 1) if text.strip()})


def choices(options: Sequence[str]) -> dict[str, list[Any]]:
    """The values to try of every setting: `sigma=0.1,0.5` gives two; a value that is a list stands in brackets.

    Raises ConfigError for what is no setting of weights.
    """
    found: dict[str, list[Any]] = {}
    for option in options:
        name, sign, values = option.partition("=")
        if not sign or name not in WeightsSettings.model_fields or name == "algorithm":
            known = ", ".join(sorted(set(WeightsSettings.model_fields) - {"algorithm"}))
            raise ConfigError(f"--set {option}: expected SETTING=VALUE or SETTING=VALUE,VALUE,… with one of {known}")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise ConfigError(f"--set {option}: {values!r} is no value, nor several separated by commas") from None
        found[name] = [[value] if name == "targets" and isinstance(value, str) else value for value in parsed]
    return found


def replays(recording: Recording, algorithms: Sequence[str], tried: Mapping[str, Sequence[Any]]) -> list[Replay]:
    """Every rule with every combination of the values to try.

    Raises ConfigError for a value that a setting cannot have, MissingError when the recording lacks what a rule asks.
    """
    combinations = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
    return [
        Replay(algorithm, choice, _weights(recording, _settings(recording, algorithm, choice)))
        for algorithm in algorithms
        for choice in combinations
    ]


def table(found: Sequence[Replay]) -> Table:
    """One row per replay and epoch, one column per domain."""
    domains = list(found[0].weights[0].weights)
    result = Table("algorithm", "epoch", *domains)
    for replay in found:
        for weights in replay.weights:
            shares = [f"{weights.weights[name]:.4f}" for name in domains]
            result.add_row(replay.title if weights.epoch == 1 else "", str(weights.epoch), *shares)
        result.add_section()
    return result


def as_csv(found: Sequence[Replay]) -> str:
    """The same as CSV, one line per replay, epoch and domain."""
    names = list(dict.fromkeys(name for replay in found for name in replay.choice))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["algorithm", *names, "epoch", "domain", "weight"])
    for replay in found:
        chosen = [_shown(replay.choice.get(name, "")) for name in names]
        for weights in replay.weights:
            for domain, weight in weights.weights.items():
                writer.writerow([replay.algorithm, *chosen, weights.epoch, domain, repr(weight)])
    return text.getvalue()


def _weights(recording: Recording, settings: WeightsSettings) -> list[Weights]:
    """The weights for epoch 1, and after every recorded epoch for the next."""
    rule = named(settings.algorithm)
    # The base model's losses (epoch 0) move weights only where an update comes before the first epoch.
    signals = {
        epoch: found for epoch, found in recording.signals.items() if epoch or settings.update_before_first_epoch
    }
    if rule.refers and any(signal.reference is None for found in signals.values() for signal in found.values()):
        raise MissingError(
            f"algorithm '{rule.name}' compares losses with reference losses, and the recording has none of every "
            f'domain: add a line {{"reference": {{…}}}}, or run `vtmix reference`'
        )

    def weigh(epoch: int, history: Sequence[Trained]) -> Weights:
        known = recording.knowledge, recording.sizes
        return make_weights(Situation(epoch, recording.domains, settings, *known, tuple(history)), {})

    last, history = weigh(1, ()), []
    found = [] if 0 in signals else [last]
    for epoch, seen in signals.items():
        history.append(Trained(last.weights, seen))
        last = weigh(epoch + 1, history)
        found.append(last)
    return found


def _settings(recording: Recording, algorithm: str, choice: Mapping[str, Any]) -> WeightsSettings:
    """The recording's settings with an algorithm and a choice, held against what a mixture.yaml may say."""
    weights = {**recording.settings.model_dump(mode="json"), "algorithm": algorithm, **choice}
    raw = {"model": "-", "domains": {name: {"train": "-"} for name in recording.domains}, "weights": weights}
    return configuration.validate(raw, Path("replay")).weights


def _of_run(path: Path) -> Recording:
    if not (path / "mixture.yaml").exists():
        raise MissingError(f"{path} is no run folder that has begun: it holds no mixture.yaml")
    settings, run = configuration.load(path / "mixture.yaml", path), RunFolder(path)
    epochs = [epoch for epoch in range(settings.epochs + 1) if run.losses(epoch).exists()]
    losses = {epoch: Losses.read(run.losses(epoch), "") for epoch in epochs}
    reference = Reference.read(run.reference, "") if run.reference.exists() else None
    detection = DetectionReport.read(run.detection, "") if run.detection.exists() else None
    # Not from the pools, which may stand elsewhere: the plan says how large they were.
    plan = Plan.read(run.plan(1), "") if run.plan(1).exists() else None
    return Recording(
        domains=tuple(settings.domains),
        signals={
            epoch: make_signals(found, losses.get(epoch - 1), reference, unit_of(found, reference))
            for epoch, found in losses.items()
        },
        knowledge=detection.distribution if detection else None,
        sizes={name: domain.pool_samples for name, domain in plan.domains.items()} if plan else None,
        settings=settings.weights,
    )


def _line(path: Path, number: int, text: str) -> Line:
    try:
        return Line.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{number}: is not JSON ({error.msg} at column {error.colno})") from None
    except ValidationError as error:
        problems = (
            f"{path}:{number}: {'.'.join(map(str, item['loc'])) or 'line'}: {item['msg']} (found {item['input']!r:.60})"
            for item in error.errors()
        )
        raise RecordError(listing(problems)) from None


def _of_lines(path: Path, lines: Mapping[int, Line]) -> Recording:
    losses: dict[int, Mapping[str, float]] = {}
    rest: dict[str, Mapping[str, Any]] = {}
    domains: tuple[str, ...] = ()
    for number, line in lines.items():
        where = f"{path}:{number}"
        for name in ("losses", "knowledge", "reference", "sizes"):
            found = getattr(line, name)
            domains = domains or tuple(found or ())
            if found is not None and set(found) != set(domains):
                raise RecordError(f"{where}: {name} of {', '.join(found)}, expected those of {', '.join(domains)}")
            if found is not None and name != "losses":
                rest[name] = found
        if line.losses is not None and line.epoch is not None:
            expected = max(losses) + 1 if losses else min(line.epoch, 1)
            if line.epoch != expected:
                raise RecordError(f"{where}: epoch {line.epoch}, expected {expected}: epochs come in order, from 0")
            losses[line.epoch] = line.losses
    if not losses:
        raise RecordError(f'{path}: holds no losses, expected lines like {{"epoch": 1, "losses": {{"law": 2.5}}}}')
    signals = dict(_signals(losses, rest.get("reference")))
    return Recording(domains, signals, WeightsSettings(), rest.get("knowledge"), rest.get("sizes"))


def _signals(
    losses: Mapping[int, Mapping[str, float]], reference: Mapping[str, float] | None
) -> Iterator[tuple[int, dict[str, Signal]]]:
    for epoch, found in losses.items():
        before = losses.get(epoch - 1)
        signals = {
            name: Signal(loss, reference[name] if reference else None, before[name] if before else None)
            for name, loss in found.items()
        }
        yield epoch, signals


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
