"""One run in Composer's Trainer: model, optimizer, data and loggers, set up from the configuration."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.core import DataSpec
from composer.loggers import MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import MissingConditionalImportError, dist, reproducibility
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from vtmix import batches, commit, progress
from vtmix.artifacts import DomainLoss, run_folder
from vtmix.compile import open_pools
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError
from vtmix.loop import Mixture
from vtmix.pool import eval_sizes
from vtmix.settings import MixtureConfig
from with_composer.callbacks import LearningRate, Progress, Saver, StepLog
from with_composer.model import LOSS, ResponseModel
from with_composer.ranks import TIMEOUT_SECONDS, device_of, on_rank_zero

Split = Callable[[batches.Batch, int | float], list[batches.Batch]]


class Session:
    """A run's model and optimizer, from a checkpoint's state where there is one."""

    def __init__(self, config: MixtureConfig, state: Path | None, callbacks: Sequence[Callback]) -> None:
        location, revision = config.model_location(config.model), config.model.revision
        self._config, self._run = config, run_folder(config)
        self._tokenizer = load_tokenizer(location, revision)
        model = batches.load_model(location, revision)
        if config.mixture.packing:
            batches.require_apart(model)
        self._model = ResponseModel(model, self._tokenizer)
        settings = config.training
        sizes = eval_sizes(config, {name: pool.manifest for name, pool in open_pools(config).items()})
        self._saver = Saver(self._run.checkpoints, settings.checkpoint_steps, settings.keep_checkpoints)
        self._progress = Progress()
        own = [
            LearningRate(settings.lr, config.epochs, settings.warmup),
            StepLog(self._run.path / "training" / "steps.jsonl"),
            self._saver,
            self._progress,
        ]
        self._trainer = Trainer(
            model=self._model,
            optimizers=adamw(config, self._model),
            eval_dataloader=[self._evaluator(domain, count) for domain, count in sizes.items()],
            eval_interval=0,
            algorithms=clipping(settings.max_grad_norm),
            callbacks=[*own, *callbacks],
            loggers=list(destinations(config)),
            run_name=self._run.path.name,
            progress_bar=False,
            load_path=str(state) if state else None,
            accumulate_train_batch_on_tokens=True,
            # Spinning would draw from a mixture once for every epoch before it, and after a resume it would not.
            spin_dataloaders=False,
            seed=config.seed % 2**32,
            dist_timeout=TIMEOUT_SECONDS,
            **execution(config),
        )

    @property
    def epochs_done(self) -> int:
        """Epochs whose every step was taken."""
        return int(self._trainer.state.timestamp.epoch.value)

    def fit(self, mixture: Mixture) -> None:
        """Takes the steps of an epoch that were not taken yet, and commits a checkpoint at its end."""
        self._saver.mixture = mixture
        size = self._config.training.batch_size // dist.get_world_size()
        data = self._data(open_mixture(mixture, size), size)
        left = len(data.dataloader) - int(self._trainer.state.timestamp.batch_in_epoch.value)
        self._restore_random_state()
        with self._bar(f"train epoch {mixture.epoch}/{self._config.epochs}", left, "steps") as self._progress.advance:
            self._trainer.fit(train_dataloader=data, duration="1ep")

    def evaluate(self) -> dict[str, DomainLoss]:
        """Every domain's held-out loss now."""
        total = sum(len(evaluator.dataloader.dataloader) for evaluator in self._trainer.state.evaluators)
        title = f"evaluate after epoch {self.epochs_done}" if self.epochs_done else "evaluate the base model"
        with self._bar(title, total, "batches") as self._progress.advance:
            self._trainer.eval()
        return {domain: metrics[LOSS].loss() for domain, metrics in self._trainer.state.eval_metrics.items()}

    def export(self, final: Path) -> None:
        """Publishes the model and its tokenizer as a Hugging Face folder, in float32."""
        weights = {
            name.removeprefix("model."): value for name, value in self._trainer.state.get_model_state_dict().items()
        }
        on_rank_zero(lambda: self._publish(final, weights))
        self._trainer.close()

    def _publish(self, final: Path, weights: Mapping[str, torch.Tensor]) -> None:
        staging = commit.staging_folder(final, "export")
        self._model.model.save_pretrained(staging, state_dict=dict(weights), safe_serialization=True)
        self._tokenizer.save_pretrained(staging)
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
        commit.publish_folder(staging, final)

    def _evaluator(self, domain: str, count: int) -> Evaluator:
        # Composer drops the samples that fill up the last ranks by splitting the last row off: rows must stay in order.
        settings = self._config.training
        samples = batches.held_out(self._run.pool(domain) / "eval", count)
        data = self._data(samples, settings.eval_batch_size, dist.get_sampler(samples), batches.split_in_order)
        return Evaluator(label=domain, dataloader=data, metric_names=[LOSS])

    def _data(self, dataset: Any, batch_size: int, sampler: Any = None, split: Split = batches.split) -> DataSpec:
        pad = self._tokenizer.pad_token_id or 0
        # A generator of its own: a loader's first step draws from the global one, and a resumed run has fewer of them.
        loader = DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            collate_fn=partial(batches.collate, pad_id=pad),
            generator=torch.Generator(),
        )
        return DataSpec(
            loader,
            split_batch=split,
            get_num_samples_in_batch=lambda batch: len(batch["labels"]),
            get_num_tokens_in_batch=_tokens,
        )

    def _bar(self, title: str, total: int, unit: str) -> Any:
        return progress.bar(title, total if dist.get_global_rank() == 0 else 0, unit)

    def _restore_random_state(self) -> None:
        """Composer does so at an epoch's start only, and forgets the state where it does not spin its loaders."""
        state, self._trainer._rng_state = self._trainer._rng_state, None
        if state is not None:
            reproducibility.load_rng_state(state)


def adamw(config: MixtureConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over all parameters; fused, which on CPUs too takes a fifth of the time."""
    settings = config.training
    return torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def execution(config: MixtureConfig) -> dict[str, Any]:
    """What steers how the work is carried out, in Composer's words."""
    settings, device = config.training, device_of(config)
    precision, microbatch = settings.precision, settings.microbatch_size
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "amp_bf16"
    if microbatch == "auto" and device == "cpu":
        microbatch = None
    return {
        "device": device,
        "precision": precision,
        "device_train_microbatch_size": microbatch,
        "parallelism_config": None if settings.fsdp is None else {"fsdp": dict(settings.fsdp)},
    }


def open_mixture(mixture: Mixture, batch_size: int) -> StreamingDataset:
    """An epoch's shards in the order on disk, which is training order on any number of ranks.

    One canonical node makes step s take samples s·batch … (s+1)·batch of that order over all ranks together.
    """
    return StreamingDataset(
        local=str(mixture.expanded or mixture.folder),
        remote=str(mixture.folder) if mixture.expanded else None,
        shuffle=False,
        shuffle_seed=0,
        num_canonical_nodes=1,
        batch_size=batch_size,
    )


def _tokens(batch: batches.Batch) -> dict[str, int]:
    return {"total": sum(batch["tokens"]), "loss_generating": batches.response_tokens(batch)}


def clipping(norm: float | None) -> list[GradientClipping]:
    """Clips the gradient's norm, unless that is None."""
    return [] if norm is None else [GradientClipping(clipping_type="norm", clipping_threshold=norm)]


def destinations(config: MixtureConfig) -> Iterator[Any]:
    """The loggers asked for, writing below the run folder's training/.

    Raises ConfigError with what to install when a logger's package is missing.
    """
    folder = run_folder(config).path / "training"
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: TensorboardLogger(log_dir=str(folder / "tensorboard")),
        "mlflow": lambda: MLFlowLogger(experiment_name="vtmix", tracking_uri=(folder / "mlflow").as_uri()),
        "wandb": lambda: WandBLogger(project="vtmix", init_kwargs={"dir": str(folder)}),
    }
    for name in config.training.loggers:
        try:
            yield makers[name]()
        except MissingConditionalImportError:
            raise ConfigError(f"training.loggers: {name!r} needs a package: `pip install {name}`") from None
