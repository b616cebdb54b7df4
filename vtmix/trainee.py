"""One domain's reference model on its way: fine-tuned epoch by epoch, checkpointed between them, and its losses."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtmix import batches, checkpoints, commit, pool
from vtmix.artifacts import DomainLoss, ReferenceLoss
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, ConflictError, LossError
from vtmix.settings import Reference as Settings
from vtmix.stores import Store

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], None]

CHECKPOINT_SECONDS = 60
"""Epochs that take less are not checkpointed one by one."""

# Rows that go through the model together: few, so that rows alike in length share little padding and memory is bounded.
MICROBATCH = 4


@dataclass(frozen=True)
class Job:
    """Everything that fine-tuning on one domain takes: small, so that it travels to a worker."""

    domain: str
    folder: Path
    store: Store | None
    model: str
    revision: str | None
    settings: Settings
    samples: int
    eval_samples: int
    eval_batch_size: int
    seed: int
    checkpoints: Path
    inputs: str
    """Fingerprint of all that its loss is made from."""

    @property
    def work(self) -> int:
        """Samples that go through the model, held-out ones included."""
        return self.settings.epochs * self.samples + (self.settings.epochs + 1) * self.eval_samples


def train_domain(job: Job, advance: Advance = lambda _: None) -> ReferenceLoss:
    """Fine-tunes a fresh copy of the reference model on one domain and returns its lowest held-out loss.

    `advance` is told of samples as they are done. Raises LossError, naming domain and epoch, when a held-out loss is
    not finite or there is nothing to take it over.
    """
    import torch

    torch.manual_seed(job.seed)
    trainee = Trainee(job, advance)
    if not trainee.losses:
        trainee.evaluate()
    while trainee.epoch < job.settings.epochs:
        trainee.train()
        trainee.evaluate()
        trainee.checkpoint()
    losses = trainee.losses
    best = min(range(len(losses)), key=lambda epoch: losses[epoch].per_token)
    curve = tuple(loss.per_token for loss in losses)
    return ReferenceLoss(**losses[best].model_dump(), epoch=best, curve=curve, trained_tokens=trainee.trained_tokens)


class Trainee:
    """One domain's reference model on its way: `epoch` epochs done, with the losses after each and before the first."""

    def __init__(self, job: Job, advance: Advance) -> None:
        """Goes on from the newest checkpoint where there is one.

        Raises ConflictError when that was made from other inputs.
        """
        import torch

        self.epoch = 0
        self.losses: list[DomainLoss] = []
        self.trained_tokens = 0

        self._job = job
        self._advance = advance
        self._device = _device(job.settings.device)
        self._tokenizer = load_tokenizer(job.model, job.revision)
        self._pad = self._tokenizer.pad_token_id or 0
        self._model: Any = batches.load_model(job.model, job.revision).to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=job.settings.lr, weight_decay=0.0, fused=self._device.type in ("cpu", "cuda")
        )
        self._pool = pool.open_pool(job.folder, job.store)
        self._restore()
        self._kept = time.monotonic()

    def train(self) -> None:
        """Takes one more epoch's steps: the samples after those of the epoch before."""
        import torch

        torch.manual_seed((self._job.seed + self.epoch) % 2**63)  # so that no random state has to be kept
        self._model.train()
        count = self._job.samples
        samples = self._pool.samples(self.epoch * count, count)
        while rows := list(islice(samples, self._job.settings.batch_size)):
            self._step(batches.collate(rows, self._pad))
            self.trained_tokens += sum(len(row["input_ids"]) for row in rows)
            self._advance(len(rows))
        self.epoch += 1

    def checkpoint(self) -> None:
        """Keeps the state, unless what was done since the last one is done again as soon as it would be saved."""
        import torch

        if time.monotonic() - self._kept < CHECKPOINT_SECONDS:
            return
        path = checkpoints.staged(self._job.checkpoints, self.epoch)
        commit.make_folder(path.parent)
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "losses": [loss.model_dump() for loss in self.losses],
            "trained_tokens": self.trained_tokens,
        }
        torch.save(state, path)
        checkpoints.publish(path, step=self.epoch, epoch=self.epoch, mixture=self._job.inputs, keep=1)
        self._kept = time.monotonic()

    def _restore(self) -> None:
        import torch

        found = checkpoints.newest(self._job.checkpoints, lambda text: print(text, file=sys.stderr))
        if found is None:
            return
        path, checkpoint = found
        if checkpoint.mixture != self._job.inputs:
            raise ConflictError(
                f"{path.parent} was trained with other settings, or on another pool, than the reference model of "
                f"'{self._job.domain}' now is: restore them, remove that folder, or start another run folder"
            )
        state = torch.load(path, map_location=self._device, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = [DomainLoss(**loss) for loss in state["losses"]]
        self.trained_tokens = state["trained_tokens"]
        self.epoch = checkpoint.epoch
        done = self.epoch * self._job.samples + len(self.losses) * self._job.eval_samples
        self._advance(done)

    def evaluate(self) -> None:
        """Takes the held-out loss now."""
        import torch

        self._model.eval()
        held_out = batches.held_out(self._job.folder / "eval", self._job.eval_samples)
        sums = batches.LossSums()
        with torch.no_grad():
            for rows in _chunks(held_out, self._job.eval_batch_size):
                batch = batches.collate(rows, self._pad)
                sums += batches.LossSums.of(batch, self._nats(batch).cpu(), self._tokenizer)
                self._advance(len(rows))
        self.losses.append(self._checked(sums.loss()))

    def _step(self, batch: batches.Batch) -> None:
        tokens = batches.response_tokens(batch)
        for microbatch in batches.split(batch, MICROBATCH):
            (self._nats(microbatch).sum() / tokens).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _nats(self, batch: batches.Batch) -> "torch.Tensor":
        import torch

        moved = {name: value.to(self._device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        precision = self._job.settings.precision
        half = precision == "bf16" or (precision == "auto" and self._device.type == "cuda")
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            return batches.response_nats(self._model, moved)

    def _checked(self, loss: DomainLoss) -> DomainLoss:
        where = f"of the reference model of '{self._job.domain}' after epoch {self.epoch}"
        if not loss.tokens:
            raise LossError(
                f"the held-out loss {where} was taken over no response token: "
                "give the domain `eval` sources, or raise pool.eval_fraction"
            )
        if not math.isfinite(loss.nats):
            raise LossError(f"the held-out loss {where} is {loss.nats}: lower reference.lr")
        return loss


def _device(wanted: str) -> "torch.device":
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"reference.device is {wanted!r} but torch sees no GPU: use 'auto' or 'cpu'")
    return torch.device(wanted)


def _chunks(items: Any, size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield [items[number] for number in range(start, min(start + size, len(items)))]
