"""What Composer's Trainer is given: a model whose loss counts every response token alike, data, and callbacks.

Importing this module imports Composer and StreamingDataset, which takes many seconds.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from composer import Callback, Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.core import DataSpec
from composer.loggers import MLFlowLogger, TensorboardLogger, WandBLogger
from composer.models import ComposerModel
from composer.utils import MissingConditionalImportError, dist, get_device, reproducibility
from composer.utils.checkpoint import save_checkpoint
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchmetrics import Metric

from vtmix import batches, checkpoints, commit, progress
from vtmix.artifacts import DomainLoss, run_folder
from vtmix.config import MixtureConfig
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, LossError, VtmixError
from vtmix.loop import Mixture

Result = TypeVar("Result")

LOSS = "nats_per_token"
# Ranks wait for rank 0 while it writes an epoch's shards; a rank that dies is noticed by the launcher, not by this.
DIST_TIMEOUT_SECONDS = 12 * 3600.0


def start_ranks(config: MixtureConfig) -> None:
    """Connects the ranks to each other.

    Raises ConfigError when the device, precision or batch sizes cannot be used on them.
    """
    settings, device = config.training, device_of(config)
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("training.device is 'gpu' but torch sees none: use 'auto' or 'cpu'")
    if device == "cpu" and settings.precision not in ("auto", "fp32"):
        raise ConfigError(f"training.precision {settings.precision!r} needs a GPU: on CPUs use 'auto' or 'fp32'")
    if device == "cpu" and settings.fsdp is not None:
        raise ConfigError("training.fsdp needs GPUs: set it to null")
    if (settings.fsdp or {}).get("state_dict_type", "full") != "full":
        raise ConfigError("training.fsdp.state_dict_type: checkpoints are one file each, so it has to be 'full'")
    ranks = dist.get_world_size()
    for name, value in (("training.batch_size", settings.batch_size), ("samples_per_epoch", config.samples_per_epoch)):
        if value % ranks:
            near = value - value % ranks or ranks
            raise ConfigError(f"{name} {value} cannot be divided among {ranks} ranks: set it to {near}, say")
    dist.initialize_dist(device, DIST_TIMEOUT_SECONDS)


def device_of(config: MixtureConfig) -> str:
    """cpu or gpu, in Composer's words."""
    wanted = config.training.device
    return str(get_device(None if wanted == "auto" else wanted).name)


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Calls a function on rank 0 while the others wait; every rank gets its result, or its refusal."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = function()
        except VtmixError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def open_mixture(folder: Path, batch_size: int) -> StreamingDataset:
    """An epoch's shards in the order on disk, which is training order on any number of ranks.

    One canonical node makes step s take samples s·batch … (s+1)·batch of that order over all ranks together.
    """
    return StreamingDataset(
        local=str(folder), shuffle=False, shuffle_seed=0, num_canonical_nodes=1, batch_size=batch_size
    )


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at step 0 … steps - 1: linear warm-up, then a cosine to 0 at `steps`."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2


class ResponseModel(ComposerModel):  # type: ignore[misc]
    """A causal language model whose output is the nats of every response token of a batch."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        blocks = set(model._no_split_modules or ())
        # FSDP shards the model block by block; Hugging Face names the classes that are one.
        self.model.fsdp_wrap_fn = lambda module: type(module).__name__ in blocks

    def forward(self, batch: batches.Batch) -> torch.Tensor:
        """Shape (response tokens,)."""
        return batches.response_nats(self.model, batch)

    def loss(self, outputs: torch.Tensor, batch: batches.Batch) -> torch.Tensor:
        """The mean over the batch's response tokens; Composer weighs microbatches and ranks by their number."""
        return outputs.sum() / max(len(outputs), 1)

    def eval_forward(self, batch: batches.Batch, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """As forward."""
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """The summed loss, in evaluation."""
        return {} if is_train else {LOSS: SummedLoss()}

    def update_metric(self, batch: batches.Batch, outputs: torch.Tensor, metric: Metric) -> None:
        """Adds a batch's sums."""
        metric.update(batches.LossSums.of(batch, outputs, self.tokenizer))


class SummedLoss(Metric):  # type: ignore[misc]
    """LossSums as a metric, added up over ranks; its value is in nats per token."""

    full_state_update = False
    sums: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.tensor(astuple(batches.LossSums()), dtype=torch.float64)
        self.add_state("sums", zero, dist_reduce_fx="sum")

    def update(self, sums: batches.LossSums) -> None:
        """Adds one batch's sums."""
        self.sums += torch.tensor(astuple(sums), dtype=torch.float64, device=self.sums.device)

    def compute(self) -> torch.Tensor:
        """Nats per token so far."""
        return self.sums[0] / self.sums[1]

    def loss(self) -> DomainLoss:
        """The loss over all ranks; every rank has to ask."""
        total = self.sums.clone()
        dist.all_reduce(total)
        return batches.LossSums(*total.tolist()).loss()


class LearningRate(Callback):  # type: ignore[misc]
    """Sets the rate of each step from its number alone, so that it runs on over epochs, fits and restarts."""

    def __init__(self, peak: float, steps: int, warmup: float) -> None:
        self._peak, self._steps, self._warmup = peak, steps, warmup

    def batch_start(self, state: Any, logger: Any) -> None:
        """Called by Composer before each step."""
        lr = self._peak * rate(state.timestamp.batch.value, self._steps, self._warmup)
        for group in state.optimizers[0].param_groups:
            group["lr"] = lr
        logger.log_metrics({"lr": lr})


class StepLog(Callback):  # type: ignore[misc]
    """Writes one JSON line per step, {step, epoch, loss, lr, tokens}; the lines of steps taken again are replaced.

    Raises LossError on a training loss that is not finite.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def fit_start(self, state: Any, logger: Any) -> None:
        """Drops the lines after the step that training goes on from."""
        if dist.get_global_rank() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
            commit.write_staged(self._path, b"".join(lines[: state.timestamp.batch.value]))

    def batch_end(self, state: Any, logger: Any) -> None:
        """Called by Composer after each step."""
        loss = state.total_loss_dict["loss/train/total"]
        step, epoch = state.timestamp.batch.value, state.timestamp.epoch.value + 1
        if not math.isfinite(loss):
            raise LossError(f"the training loss is {loss} at step {step} (epoch {epoch}): lower training.lr")
        if dist.get_global_rank() == 0:
            lr, tokens = state.optimizers[0].param_groups[0]["lr"], state.timestamp.token.value
            line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "tokens": tokens}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Saver(Callback):  # type: ignore[misc]
    """Commits a checkpoint at every epoch's end and, if wanted, every so many steps within epochs."""

    def __init__(self, folder: Path, every: int | None, keep: int) -> None:
        self._folder, self._every, self._keep = folder, every, keep
        self.mixture: Mixture | None = None

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        """Called by Composer after each step."""
        last = state.timestamp.batch_in_epoch.value == state.dataloader_len.value
        if self._every and state.timestamp.batch.value % self._every == 0 and not last:
            self._save(state)

    def epoch_checkpoint(self, state: Any, logger: Any) -> None:
        """Called by Composer after each epoch."""
        self._save(state)

    def _save(self, state: Any) -> None:
        step, mixture = state.timestamp.batch.value, self.mixture
        if mixture is None:
            return
        file = checkpoints.staged(self._folder, step)
        save_checkpoint(state, str(file))
        publish = partial(checkpoints.publish, file, step=step, epoch=mixture.epoch, mixture=mixture.digest)
        on_rank_zero(partial(publish, keep=self._keep))


class Progress(Callback):  # type: ignore[misc]
    """Moves the bar that is shown meanwhile."""

    def __init__(self) -> None:
        self.advance: progress.Advance = lambda _: None

    def batch_end(self, state: Any, logger: Any) -> None:
        """Called by Composer after each step."""
        self.advance(1)

    def eval_batch_end(self, state: Any, logger: Any) -> None:
        """Called by Composer after each evaluated batch."""
        self.advance(1)


class Session:
    """A run's model and optimizer in Composer's Trainer, from a checkpoint's state where there is one."""

    def __init__(self, config: MixtureConfig, state: Path | None, callbacks: Sequence[Callback]) -> None:
        run, settings = run_folder(config), config.training
        location = config.model_location(config.model)
        self._config, self._run = config, run
        self._tokenizer = load_tokenizer(location, config.model.revision)
        self._model = ResponseModel(batches.load_model(location, config.model.revision), self._tokenizer)
        self._saver = Saver(run.checkpoints, settings.checkpoint_steps, settings.keep_checkpoints)
        self._progress = Progress()
        steps = config.epochs * math.ceil(config.samples_per_epoch / settings.batch_size)
        learning_rate = LearningRate(settings.lr, steps, settings.warmup)
        log = StepLog(run.path / "training" / "steps.jsonl")
        device = device_of(config)
        automatic = settings.microbatch_size == "auto" and device == "cpu"
        self._trainer = Trainer(
            model=self._model,
            optimizers=torch.optim.AdamW(
                self._model.parameters(),
                lr=settings.lr,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=device in ("cpu", "gpu"),
            ),
            eval_dataloader=[self._evaluator(domain) for domain in config.domains],
            eval_interval=0,
            algorithms=clipping(settings.max_grad_norm),
            callbacks=[learning_rate, log, self._saver, self._progress, *callbacks],
            loggers=list(destinations(config)),
            run_name=run.path.name,
            progress_bar=False,
            load_path=str(state) if state else None,
            parallelism_config={"fsdp": dict(settings.fsdp)} if settings.fsdp is not None else None,
            device=device,
            precision={"cpu": "fp32", "gpu": "amp_bf16"}[device] if settings.precision == "auto" else settings.precision,
            device_train_microbatch_size=None if automatic else settings.microbatch_size,
            accumulate_train_batch_on_tokens=True,
            # Spinning replays an epoch's order from earlier epochs' data, which every mixture replaces.
            spin_dataloaders=False,
            seed=config.seed % 2**32,
            dist_timeout=DIST_TIMEOUT_SECONDS,
        )

    @property
    def epochs_done(self) -> int:
        """Epochs whose every step was taken."""
        return int(self._trainer.state.timestamp.epoch.value)

    def fit(self, mixture: Mixture) -> None:
        """Takes the steps of an epoch that were not taken yet, and commits a checkpoint at its end."""
        self._saver.mixture = mixture
        size = self._config.training.batch_size // dist.get_world_size()
        data = self._data(open_mixture(mixture.folder, size), size)
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
                os.fsync(file.fileno())
        commit.publish_folder(staging, final)

    def _evaluator(self, domain: str) -> Evaluator:
        settings = self._config.training
        samples = batches.held_out(self._run.pool(domain) / "eval", settings.eval_samples)
        data = self._data(samples, settings.eval_batch_size, sampler=dist.get_sampler(samples))
        return Evaluator(label=domain, dataloader=data, metric_names=[LOSS])

    def _data(self, dataset: Any, batch_size: int, sampler: Any = None) -> DataSpec:
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
            split_batch=batches.split,
            get_num_samples_in_batch=lambda batch: len(batch["sample_id"]),
            get_num_tokens_in_batch=_tokens,
        )

    def _bar(self, title: str, total: int, unit: str) -> Any:
        return progress.bar(title, total if dist.get_global_rank() == 0 else 0, unit)

    def _restore_random_state(self) -> None:
        """Composer does so at an epoch's start only, and forgets the state where it does not spin its loaders."""
        state, self._trainer._rng_state = self._trainer._rng_state, None
        if state is not None:
            reproducibility.load_rng_state(state)


def _tokens(batch: batches.Batch) -> dict[str, int]:
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": batches.response_tokens(batch)}


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
