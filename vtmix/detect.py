"""Algorithm 1 on Ray: sample the base model from its start token, classify what it says, average.

Work is cut into blocks of samples, each a row of one Ray Data pipeline: generate (actors) → classify (actors) → commit
one Parquet part (here, in the driver). A part exists completely or not at all and depends on nothing but its block, so
a rerun does the missing blocks only and ends with the same bytes. The estimate is computed from the parts.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from vtmix import classify, cluster, commit, estimate, generate, pool, progress
from vtmix.artifacts import ClassifierReport, DetectionReport, Inputs, PoolManifest, RunFolder, run_folder
from vtmix.distribute import cores
from vtmix.encode import load_tokenizer, tokenizer_digest
from vtmix.errors import DetectionError
from vtmix.samples import Block, Parts, Sample, blocks_of
from vtmix.settings import MixtureConfig


def detect(config: MixtureConfig) -> DetectionReport:
    """The knowledge distribution of config.model over config.domains, committed as detection/detection.json.

    Raises MissingError without pools, ConflictError when samples or a detection of other inputs stand in the run
    folder, DamageError when committed parts do not hold their samples, DetectionError when too much of them is
    unclassified or the model cannot be run. Whatever is raised, committed parts are kept.
    """
    run = run_folder(config)
    cluster.require_durable(run)
    found = _committed(run, config)
    if found is not None:
        _refuse_unclassified(found.unclassified, found.samples, config)
        return found
    inputs = _inputs(run, config)
    with commit.lock(run.detection.parent, "detection"):
        tokenizer = load_tokenizer(config.model_location(config.model), config.model.revision)
        sampling = generate.sampling(config, tokenizer)
        inputs = inputs | {"tokenizer": tokenizer_digest(tokenizer)}
        probe = _probe(run, config, inputs)
        parts = _parts(run, config, inputs, probe)
        _draw(parts, parts.missing(), sampling, probe, config)
        report = _report(parts.read(), config, inputs, sampling.start_token, probe.report)
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
    remedy = "run `vtmix pool` first: the classifier is fitted on the domains' own text"
    pools = {name: PoolManifest.read(run.pool(name) / "pool.json", remedy).fingerprint() for name in config.domains}
    return {
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "domains": list(config.domains),
        "pools": pools,
        "sampling": {
            **settings.model_dump(
                mode="json", include={"iterations", "samples", "max_tokens", "block", "start_token", "precision"}
            ),
            **generate.DECODING,
        },
        "classifier": {**settings.classifier.model_dump(mode="json"), **classify.PROBE_SETTINGS},
    }


def _probe(run: RunFolder, config: MixtureConfig, inputs: Inputs) -> classify.FittedProbe:
    """The run's probe: fitted once, and committed, so that every part is judged by the same numbers."""
    path = run.detection.with_name("classifier.json")
    found = classify.FittedProbe.committed(path, inputs)
    if found is not None:
        return found
    fitted = classify.fit_probe(
        {domain: pool.texts(run.pool(domain)) for domain in config.domains},
        max_tokens=config.detection.max_tokens,
        heldout=config.detection.classifier.heldout,
        inputs=inputs,
    )
    fitted.publish(path)
    return fitted


def _parts(run: RunFolder, config: MixtureConfig, inputs: Inputs, probe: classify.FittedProbe) -> Parts:
    settings = config.detection
    return Parts(
        folder=run.detection.parent,
        domains=tuple(config.domains),
        blocks=blocks_of(settings.iterations, settings.samples, settings.block),
        seed=config.seed,
        made_from={"inputs": inputs, "classifier": probe.fingerprint()},
    )


def _draw(
    parts: Parts,
    missing: Sequence[Block],
    sampling: generate.Sampling,
    probe: classify.FittedProbe,
    config: MixtureConfig,
) -> None:
    """Generates, classifies and commits the missing blocks."""
    if not missing:
        return
    generating, classifying = config.detection.generate, config.detection.classify
    cpus = generating.actors * generating.cpus + classifying.actors * classifying.cpus
    samples = sum(block.stop - block.start for block in missing)
    with cluster.connect(cpus), progress.bar("detect", samples, "samples") as advance:
        gpus = generating.actors * _gpus(config) + classifying.actors * classifying.gpus
        cluster.require_resources(cpus, gpus)
        for block, data in _pipeline(parts, missing, sampling, probe, config):
            parts.publish(block, data)
            advance(block.stop - block.start)


def _gpus(config: MixtureConfig) -> float:
    """GPUs per generating actor: as set, else one where the cluster has them and the device allows."""
    import ray

    settings = config.detection
    if settings.generate.gpus or settings.device == "cpu":
        return settings.generate.gpus
    enough = ray.cluster_resources().get("GPU", 0) >= settings.generate.actors
    return 1 if enough or settings.device.startswith("cuda") else 0


def _pipeline(
    parts: Parts,
    missing: Sequence[Block],
    sampling: generate.Sampling,
    probe: classify.FittedProbe,
    config: MixtureConfig,
) -> Iterator[tuple[Block, bytes]]:
    """Yields each missing block's Parquet file, in order of completion."""
    import ray.data

    generating, classifying = config.detection.generate, config.detection.classify
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say is raised as well
    rows = ray.data.from_items([{"block": list(block)} for block in missing], override_num_blocks=len(missing))
    rows.context.enable_progress_bars = False
    files = rows.map(
        _Generate,
        fn_constructor_args=(parts, sampling, generating.actors),
        compute=ray.data.ActorPoolStrategy(size=generating.actors),
        num_cpus=generating.cpus,
        num_gpus=_gpus(config),
    ).map(
        _Classify,
        fn_constructor_args=(parts, probe),
        compute=ray.data.ActorPoolStrategy(size=classifying.actors),
        num_cpus=classifying.cpus,
        num_gpus=classifying.gpus,
    )
    try:
        # Without prefetching: that would hold each part back until the next one is ready.
        for table in files.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in table.to_pylist():
                yield Block(*row["block"]), row["part"]
    except ray.exceptions.RayError as error:
        raise _explained(error) from error


class _Generate:
    """The generating stage, an actor: a block → its samples."""

    def __init__(self, parts: Parts, sampling: generate.Sampling, actors: int) -> None:
        self._parts = parts
        self._sampling = sampling
        self._actors = actors

    # Not in __init__: an actor that cannot be made is reported by Ray with every frame of its own code.
    @functools.cached_property
    def _generator(self) -> generate.TransformersGenerator:
        import torch

        # Ray gives an actor as many threads as it reserves CPUs; together they should use all the cores there are.
        torch.set_num_threads(max(torch.get_num_threads(), cores() // self._actors))
        return generate.TransformersGenerator(self._sampling)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        samples = self._generator(self._parts.seeds(Block(*row["block"])))
        return row | {"samples": json.dumps([dataclasses.astuple(sample) for sample in samples])}


class _Classify:
    """The classifying stage: a block's samples → its Parquet file."""

    def __init__(self, parts: Parts, probe: classify.FittedProbe) -> None:
        self._parts = parts
        self._classifier = classify.LinearProbe(probe)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        samples = [Sample(text, tuple(ids), reason) for text, ids, reason in json.loads(row["samples"])]
        judged = self._classifier([sample.text for sample in samples])
        return {"block": row["block"], "part": self._parts.encode(Block(*row["block"]), samples, judged)}


def _explained(error: Exception) -> DetectionError:
    """What stopped the pipeline, in one line: the worker's own error, which Ray carries as text within its frames."""
    own = str(error).partition("\n\nThe above exception")[0].strip()
    reason = own.splitlines()[-1].removeprefix("vtmix.errors.").strip() if own else type(error).__name__
    return DetectionError(f"sampling stopped: {reason}: what is committed is kept, a rerun goes on from there")


def _report(
    samples: pl.DataFrame, config: MixtureConfig, inputs: Inputs, start_token: str, classifier: ClassifierReport
) -> DetectionReport:
    shares = estimate.shares(samples, list(config.domains))
    unclassified = estimate.unclassified(samples)
    _refuse_unclassified(unclassified, len(samples), config)
    return DetectionReport(
        inputs=inputs,
        distribution=estimate.distribution(shares),
        shares=shares,
        unclassified=unclassified,
        samples=len(samples),
        tokens=int(samples["tokens"].sum()),
        start_token=start_token,
        classifier=classifier,
    )


def _refuse_unclassified(share: float, samples: int, config: MixtureConfig) -> None:
    most = config.detection.max_unclassified
    if share > most:
        raise DetectionError(
            f"{share:.1%} of the mass of {samples:,} samples is unclassified, detection.max_unclassified allows "
            f"{most:.1%}: nothing was published, the samples are kept. Read some of them "
            f"(detection/iteration-01/*.parquet). Where they are empty or no text, set detection.start_token to the "
            f"token that the model's documents begin with, and detect in another run folder; where they are as they "
            f"should be, raise detection.max_unclassified and run again"
        )
