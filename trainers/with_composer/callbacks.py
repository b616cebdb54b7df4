"""What happens at the steps of training: the learning rate, a line of record, checkpoints, a progress bar."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from composer import Callback
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from vtmix import checkpoints, commit, progress
from vtmix.errors import LossError
from vtmix.loop import Mixture
from with_composer.ranks import on_rank_zero


def rate(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at step 0 … steps - 1: linear warm-up, then a cosine to 0 at `steps`."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2


class LearningRate(Callback):  # type: ignore[misc]
    """Sets the rate of each step from the share of all epochs that is done, so that it runs on over epochs, fits and
    restarts, though an epoch of packed sequences has as many steps as it turns out to have.
    """

    def __init__(self, peak: float, epochs: int, warmup: float) -> None:
        self._peak, self._epochs, self._warmup = peak, epochs, warmup

    def batch_start(self, state: Any, logger: Any) -> None:
        """Called by Composer before each step."""
        # As if every epoch had the steps of this one.
        steps, time = state.dataloader_len.value, state.timestamp
        step = time.epoch.value * steps + time.batch_in_epoch.value
        lr = self._peak * rate(step, self._epochs * steps, self._warmup)
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
