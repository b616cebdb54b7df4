"""A language model for Composer, whose losses count every response token alike on any number of ranks."""

from dataclasses import astuple
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import dist
from torchmetrics import Metric

from vtmix import batches
from vtmix.artifacts import DomainLoss

LOSS = "nats_per_token"


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
