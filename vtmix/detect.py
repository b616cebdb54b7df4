"""Algorithm 1: sample the base model from its start token, classify what it says, average.

Work is cut into blocks of samples, each of which becomes one committed Parquet part (vtmix/stages.py draws them on
Ray). A part exists completely or not at all and depends on nothing but its block, so a rerun draws the missing blocks
only and ends with the same bytes. The estimate is computed from the parts.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import polars as pl

from vtmix import (
    classify,
    cluster,
    commit,
    engine,
    estimate,
    forecast,
    generate,
    pool,
    probe,
    progress,
    published,
    question,
    stages,
)
from vtmix.artifacts import DetectionReport, Inputs, PoolManifest, RunFolder, run_folder
from vtmix.classify import Judged, MeasuredClassifier
from vtmix.config import EXECUTION_ONLY
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.environments import require_vllm
from vtmix.errors import DetectionError
from vtmix.estimate import EarlyStop
from vtmix.judge import EndpointJudge, VllmJudge
from vtmix.samples import CONTROL, Block, Parts, blocks_of, control_blocks
from vtmix.settings import Endpoint, MixtureConfig, Probe, PublishedName, Vllm
from vtmix.stages import Stage

LONGEST_TOKEN = 64
"""Characters: as much of a text as is read for each token of an opening."""
STEERING = {
    name.rpartition(".")[2]
    for name in EXECUTION_ONLY
    if name.startswith(("detection.engine.", "detection.classifier."))
}
"""Settings of engines and classifiers that steer the work: what comes out is the same, up to a device's rounding."""


def detect(config: MixtureConfig) -> DetectionReport:
    """The knowledge distribution of config.model over config.domains, committed as detection/detection.json.

    Raises MissingError without pools, ConflictError when samples or a detection of other inputs stand in the run
    folder, DamageError when committed parts do not hold their samples, ConfigError when an environment it needs is
    missing, DetectionError when too much of the samples is unclassified or the model cannot be run. Whatever is
    raised, committed parts are kept.
    """
    run = run_folder(config)
    cluster.require_durable(run)
    if config.detection.published is not None:
        return _take_published(run, config, config.detection.published)
    found = _committed(run, config)
    if found is not None:
        _refuse_unclassified(found.unclassified, found.samples, config)
        return found
    inputs = _inputs(run, config)
    with commit.lock(run.detection.parent, "detection"), ExitStack() as until_done:
        tokenizer = load_tokenizer(config.model_location(config.model), config.model.revision)
        sampling = generate.sampling(config, tokenizer)
        inputs = inputs | {"tokenizer": tokenizer_digest(tokenizer)}

        def connect() -> None:
            until_done.enter_context(cluster.connect(_cpus(config)))

        classifier = _classifier(run, config, inputs, connect)
        parts = _parts(run, config, inputs, classifier)
        samples = _draw(parts, config, sampling, classifier, connect)
        report = _report(parts, samples, config, inputs, sampling.start_token, classifier)
        report.publish(run.detection)
    return report


def _take_published(run: RunFolder, config: MixtureConfig, name: PublishedName) -> DetectionReport:
    """A published distribution, committed like a detection and labelled as what it is."""
    inputs: Inputs = {"published": name, "domains": list(config.domains)}
    found = DetectionReport.committed(run.detection, inputs)
    if found is not None:
        return found
    report = DetectionReport(
        inputs=inputs,
        distribution=published.distribution(name, tuple(config.domains)),
        knowledge=published.label(name),
    )
    report.publish(run.detection)
    return report


def _committed(run: RunFolder, config: MixtureConfig) -> DetectionReport | None:
    """The committed detection, if there is one; loads no tokenizer, whose digest enters by way of the pools."""
    if not run.detection.exists():
        return None
    found = DetectionReport.read(run.detection, "")
    if found.inputs is None:
        return found
    expected = _inputs(run, config) | {"tokenizer": found.inputs.get("tokenizer")}
    return DetectionReport.committed(run.detection, expected)


def _inputs(run: RunFolder, config: MixtureConfig) -> Inputs:
    """What a detection is made from, but for the tokenizer's digest."""
    settings = config.detection
    remedy = "run `vtmix pool` first: the classifier is fitted on, or measured by, the domains' own text"
    pools = {name: PoolManifest.read(run.pool(name) / "pool.json", remedy).fingerprint() for name in config.domains}
    classifier = settings.classifier
    fixed = probe.SETTINGS if isinstance(classifier, Probe) else {"prompt": classifier.prompt or question.PROMPT}
    return {
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "domains": list(config.domains),
        "pools": pools,
        "sampling": {
            **settings.model_dump(
                mode="json",
                include={
                    *("iterations", "samples", "stop_at_margin", "max_tokens", "block"),
                    *("start_token", "precision", "control", "opening"),
                },
            ),
            **generate.DECODING,
        },
        "engine": settings.engine.model_dump(mode="json", exclude=STEERING) | engine.shaping(settings.engine),
        "classifier": {
            **classifier.model_dump(mode="json", exclude=STEERING),
            **engine.shaping(classifier),
            **fixed,
        },
        "correct": settings.correct,
    }


def _classifier(
    run: RunFolder, config: MixtureConfig, inputs: Inputs, connect: Callable[[], None]
) -> MeasuredClassifier:
    """The run's classifier: fitted and measured once, and committed, so that every part is judged by the same one."""
    path = run.detection.with_name("classifier.json")
    settings = config.detection.classifier
    made_from = {name: value for name, value in inputs.items() if name not in ("sampling", "engine", "correct")} | {
        "max_tokens": config.detection.max_tokens
    }
    kind = probe.FittedProbe if isinstance(settings, Probe) else MeasuredClassifier
    found = kind.committed(path, made_from)
    if found is not None:
        return found
    texts = {domain: pool.texts(run.pool(domain)) for domain in config.domains}
    made: MeasuredClassifier
    if isinstance(settings, Probe):
        made, judged = probe.fit_probe(
            texts, max_tokens=config.detection.max_tokens, folds=settings.folds, inputs=made_from
        )
    else:
        judged = _judged(texts, settings.heldout, config, connect)
        _refuse_silent_judge(judged, config)
        made = MeasuredClassifier(
            inputs=made_from, domains=tuple(judged), report=classify.measure(settings.kind, judged)
        )
    classify.publish_judged(_heldout(run), judged)
    made.publish(path)
    return made


def _judged(texts: dict[str, list[str]], heldout: int, config: MixtureConfig, connect: Callable[[], None]) -> Judged:
    """A judge's probabilities for the first `heldout` labelled texts of every domain."""
    labelled = {domain: found[:heldout] for domain, found in classify.cut(texts, config.detection.max_tokens).items()}
    judged = {domain: np.zeros((len(found), len(labelled) + 1)) for domain, found in labelled.items()}
    _refuse_empty([domain for domain, found in labelled.items() if not found])
    # A judge may cost money: what else would stop this detection is found before it is asked.
    _engine(config)
    _openings(config, _control_blocks(config))
    classifying = _classifying(config, None)
    connect()
    with progress.bar("measure the judge", sum(map(len, labelled.values())), "texts") as advance:
        for domain, start, rows in stages.judge(labelled, classifying):
            judged[domain][start : start + len(rows)] = rows
            advance(len(rows))
    return judged


def _refuse_empty(domains: Sequence[str]) -> None:
    if domains:
        raise DetectionError(
            f"{', '.join(map(repr, domains))}: no text to measure the judge with, expected some of every domain: add "
            "samples, or raise pool.texts and rebuild the pool"
        )


def _refuse_silent_judge(judged: Judged, config: MixtureConfig) -> None:
    """Of the domains' own texts, a judge has to know more than may be left unclassified of any."""
    share = float(np.mean([rows[:, -1].mean() for rows in judged.values()]))
    most = config.detection.max_unclassified
    if share > most:
        raise DetectionError(
            f"the judge leaves {share:.1%} of the domains' own texts unclassified, detection.max_unclassified allows "
            f"{most:.1%}: no sample was drawn. Its answer has to begin with a marker: see to prompt, options and "
            "markers of detection.classifier, or take another model (one that answers without thinking first)"
        )


def _parts(run: RunFolder, config: MixtureConfig, inputs: Inputs, classifier: MeasuredClassifier) -> Parts:
    settings = config.detection
    # Where it stops, and what is made of the parts, is no part's business.
    sampling = {name: value for name, value in inputs["sampling"].items() if name != "stop_at_margin"}
    made_from = {name: value for name, value in inputs.items() if name != "correct"} | {"sampling": sampling}
    return Parts(
        folder=run.detection.parent,
        domains=tuple(config.domains),
        blocks=blocks_of(settings.iterations, settings.samples, settings.block),
        seed=config.seed,
        made_from={"inputs": made_from, "classifier": classifier.fingerprint()},
        control=_control_blocks(config),
    )


def _control_blocks(config: MixtureConfig) -> tuple[Block, ...]:
    return control_blocks(len(config.domains), config.detection.control, config.detection.block)


def _draw(
    parts: Parts,
    config: MixtureConfig,
    sampling: generate.Sampling,
    classifier: MeasuredClassifier,
    connect: Callable[[], None],
) -> pl.DataFrame:
    """Every sample of the detection but its control group: those that are committed, and those that were missing."""
    missing = parts.missing()
    stop = _early_stop(parts, config)
    absent = set(missing)
    may_stop = config.detection.stop_at_margin is not None
    if may_stop:
        present = [block for block in (*parts.control, *parts.blocks) if block not in absent]
        for block, frame in zip(present, parts.read(present), strict=True):
            stop.take(block, frame)
    if missing and (stop.rounds is None or absent.intersection(parts.control)):
        classifying = _classifying(config, classifier)
        engine_name = _engine(config)
        connect()
        generating = _generating(config, sampling)
        samples = sum(block.stop - block.start for block in missing)
        watch = forecast.Stopwatch(engine_name, config.detection.generate.actors, config.detection.classify.actors)
        drawn = stages.draw(parts, _openings(config, missing), generating, classifying)
        with closing(drawn), progress.bar("detect", samples, "samples") as advance:
            for found in drawn:
                parts.publish(found.block, found.part)
                watch.take(found.block.stop - found.block.start, found.tokens, found.generating, found.classifying)
                advance(found.block.stop - found.block.start)
                absent.remove(found.block)
                if may_stop:
                    stop.take(found.block, parts.decode(found.part))
                if stop.rounds is not None and absent.isdisjoint(parts.control):
                    break
        watch.append(parts.folder / forecast.RATES)
    rounds = parts.rounds[: stop.rounds]
    return pl.concat(parts.read([block for blocks in rounds for block in blocks]))


def _early_stop(parts: Parts, config: MixtureConfig) -> EarlyStop:
    """What is reported is what has to be known to the margin: the corrected shares where these are asked for."""
    margin, correct = config.detection.stop_at_margin, config.detection.correct
    judged, control = None, parts.control if correct else ()
    if margin is not None and correct and not control:
        judged = classify.read_judged(_heldout(run_folder(config)), list(config.domains))
    return EarlyStop(
        parts.rounds,
        parts.domains,
        margin,
        judged=judged,
        control=control,
        seed=config.seed,
    )


def _openings(config: MixtureConfig, blocks: Sequence[Block]) -> dict[Block, generate.Openings]:
    """What the samples of each block are to continue: openings of the domains' texts for the control group."""
    if not any(block.iteration == CONTROL for block in blocks):
        return dict.fromkeys(blocks, ())
    tokenizer = load_tokenizer(config.model_location(config.model), config.model.revision)
    count, length = config.detection.control, config.detection.opening
    openings: list[list[int]] = []
    for domain in config.domains:
        texts = (text[: LONGEST_TOKEN * length] for text in pool.texts(run_folder(config).pool(domain)))
        ids = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        found = list(itertools.islice((of_text[:length] for of_text in ids if len(of_text) >= length), count))
        if not found:
            raise DetectionError(
                f"domain '{domain}' has no text of {length} tokens that the control group could continue: add samples "
                "to it, raise pool.texts and rebuild its pool, lower detection.opening, or set detection.control to 0"
            )
        openings += itertools.islice(itertools.cycle(found), count)
    return {block: openings[block.start : block.stop] if block.iteration == CONTROL else () for block in blocks}


def _cpus(config: MixtureConfig) -> float:
    """CPUs that both stages reserve."""
    return config.detection.generate.all_cpus + config.detection.classify.all_cpus


def _engine(config: MixtureConfig) -> str:
    """What generates, after a look whether it is there."""
    settings = config.detection.engine
    if not isinstance(settings, Vllm):
        return settings.kind
    engine.require_free(settings)
    return require_vllm(config.resolve(settings.python))


def _generating(config: MixtureConfig, sampling: generate.Sampling) -> Stage:
    """The generating stage."""
    settings, resources, device = config.detection.engine, config.detection.generate, config.detection.device
    if not isinstance(settings, Vllm):
        return Stage(functools.partial(generate.TransformersGenerator, sampling), resources, device)
    make = functools.partial(generate.VllmGenerator, sampling, settings)
    return Stage(make, resources, device, settings.tensor_parallel, config.resolve(settings.python))


def _classifying(config: MixtureConfig, fitted: MeasuredClassifier | None) -> Stage:
    """The classifying stage, after a look whether what it needs is there."""
    settings, resources = config.detection.classifier, config.detection.classify
    if isinstance(fitted, probe.FittedProbe):
        return Stage(functools.partial(probe.LinearProbe, fitted), resources)
    if isinstance(settings, Probe):
        raise TypeError("a probe is fitted before it classifies")
    domains, characters = tuple(config.domains), config.detection.max_tokens * classify.CHARACTERS_PER_TOKEN
    asked = question.inquiry(settings, domains, characters)  # mistakes in it are found here, not in an actor
    if isinstance(settings, Endpoint):
        return Stage(functools.partial(EndpointJudge, settings, domains, characters), resources)
    python, model = config.resolve(settings.python), settings.model or config.model
    location = config.model_location(model)
    require_vllm(python)
    engine.require_free(settings)
    question.marker_tokens(load_tokenizer(location, model.revision), asked.markers)
    make = functools.partial(
        VllmJudge, settings, location, model.revision, config.detection.precision, domains, characters
    )
    return Stage(make, resources, config.detection.device, settings.tensor_parallel, python)


def _report(
    parts: Parts,
    samples: pl.DataFrame,
    config: MixtureConfig,
    inputs: Inputs,
    start_token: str,
    classifier: MeasuredClassifier,
) -> DetectionReport:
    run, domains = run_folder(config), list(config.domains)
    shares = estimate.shares(samples, domains, config.seed)
    unclassified = estimate.unclassified(samples)
    _refuse_unclassified(unclassified, len(samples), config)
    raw = estimate.distribution(shares)
    control = _control(parts)
    judged = control or classify.read_judged(_heldout(run), domains)
    corrected = estimate.corrected(samples, judged, config.seed)
    tokens = int(samples["tokens"].sum())
    return DetectionReport(
        inputs=inputs,
        distribution=estimate.distribution(corrected) if config.detection.correct else raw,
        knowledge="detected, corrected" if config.detection.correct else "detected",
        shares=shares,
        corrected=corrected,
        unclassified=unclassified,
        samples=len(samples),
        tokens=tokens,
        paper_tokens=round(tokens / len(samples) * forecast.PAPER.samples),
        start_token=start_token,
        classifier=classifier.report,
        control=classify.measure("control", control) if control else None,
    )


def _control(parts: Parts) -> Judged | None:
    """The control group's probabilities by the domain whose openings it continued."""
    if not parts.control:
        return None
    return estimate.by_domain(parts.read(parts.control), parts.domains)


def _heldout(run: RunFolder) -> Path:
    return run.detection.with_name("heldout.parquet")


def _refuse_unclassified(share: float, samples: int, config: MixtureConfig) -> None:
    most = config.detection.max_unclassified
    if share > most:
        raise DetectionError(
            f"{share:.1%} of the mass of {samples:,} samples is unclassified, detection.max_unclassified allows "
            f"{most:.1%}: nothing was published, the samples are kept. Read some of them (`vtmix detect --show 5`). "
            f"Where they are empty or no text, set detection.start_token to the token that the model's documents begin "
            f"with, and detect in another run folder; where they are as they should be, raise "
            f"detection.max_unclassified and run again"
        )
