"""Samples → padded tensors → the loss of their responses, as sums that add up over batches and ranks.

The model's head is given the hidden states of response positions alone: the logits of a large vocabulary are most of
the memory of a forward pass, and those of prompts and padding would be thrown away.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from vtmix.artifacts import DomainLoss
from vtmix.errors import ConfigError
from vtmix.mds import IGNORED, PackedSample, Sample, Samples

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Batch = dict[str, Any]

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a batch gives the model, as far as it holds it."""


def load_model(location: str, revision: str | None = None) -> "PreTrainedModel":
    """The causal language model of a folder or hub name, in float32: what an optimizer keeps its weights in.

    Raises ConfigError when there is none, or none in the safetensors format.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            location, revision=revision, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: no safetensors model at {location!r}: {str(error).splitlines()[0]}") from None


def require_apart(model: "PreTrainedModel") -> None:
    """Checks that the members of a packed sequence are strangers to the model, before it is trained on any.

    transformers derives from position ids that begin anew who may attend to whom; a model that does not go by that
    would learn from mixed-up samples without a sign of it. Raises ConfigError for such a model.
    """
    import torch

    ids = torch.tensor([[1, 2, 3, 4, 5], [3, 2, 1, 4, 5]])  # They differ in their first member only.
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]] * 2), use_cache=False).logits
    if not torch.allclose(logits[0, 3:], logits[1, 3:], atol=1e-3):
        raise ConfigError(
            f"mixture.packing: {type(model).__name__} lets the members of a packed sequence see each other: remove it"
        )


def collate(samples: Sequence[Sample] | Sequence[PackedSample], pad_id: int) -> Batch:
    """A batch of samples: input_ids and labels (batch, longest), int64, and the tokens of each row, a list.

    Samples are rows padded at their end to the longest, with an attention_mask. Packed samples are of one length; in
    place of a mask they bring position_ids, from which the model derives that no member sees another. Texts are lists.
    The tensors are copies, since StreamingDataset's arrays are read-only.
    """
    return _packed(samples) if "sample_ids" in samples[0] else _padded(samples, pad_id)


def _packed(samples: Sequence[Any]) -> Batch:
    import torch

    return {
        **{
            name: torch.from_numpy(np.stack([sample[name] for sample in samples]).astype(np.int64))
            for name in ("input_ids", "labels", "position_ids")
        },
        "tokens": [int(sample["lengths"].sum()) for sample in samples],
        **{name: [str(sample[name]) for sample in samples] for name in ("sample_ids", "domains")},
    }


def _padded(samples: Sequence[Any], pad_id: int) -> Batch:
    import torch

    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    ids, mask, labels = (np.full(shape, value, np.int64) for value in (pad_id, 0, IGNORED))
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length], mask[row, :length], labels[row, :length] = sample["input_ids"], 1, sample["labels"]
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {
        **{name: torch.from_numpy(array) for name, array in tensors.items()},
        "tokens": [len(sample["input_ids"]) for sample in samples],
        **{name: [str(sample[name]) for sample in samples] for name in ("sample_id", "domain")},
    }


def split(batch: Batch, size: int | float) -> list[Batch]:
    """Microbatches of `size` rows alike in length, each cut to its longest row, shortest first."""
    import torch

    tokens = torch.tensor(batch["tokens"])
    # A sequence may be empty, but no model takes a row of no tokens.
    longest = tokens.clamp(min=1)
    return [_rows(batch, rows, int(longest[rows].max())) for rows in _cut(tokens.argsort(stable=True), size)]


def split_in_order(batch: Batch, size: int | float) -> list[Batch]:
    """Microbatches of `size` rows in the batch's order."""
    import torch

    length = batch["labels"].shape[1]
    return [_rows(batch, rows, length) for rows in _cut(torch.arange(len(batch["labels"])), size)]


def _cut(rows: "torch.Tensor", size: int | float) -> list["torch.Tensor"]:
    return [rows[start : start + int(size)] for start in range(0, len(rows), int(size))]


def _rows(batch: Batch, rows: "torch.Tensor", length: int) -> Batch:
    return {
        name: [value[row] for row in rows.tolist()] if isinstance(value, list) else value[rows, :length]
        for name, value in batch.items()
    }


def held_out(folder: Path, count: int | None) -> Any:
    """The first `count` samples (default: all) of an eval split, a dataset ordered by length so that little is padded.

    The split is in keyed-hash order, so its first samples are a fixed random subset.
    """
    from torch.utils.data import Subset

    samples = Samples(folder)
    lengths = [len(samples[number]["input_ids"]) for number in range(min(len(samples), count or len(samples)))]
    return Subset(samples, np.argsort(lengths, kind="stable").tolist())  # type: ignore[arg-type]


def targets(labels: "torch.Tensor") -> "torch.Tensor":
    """The token to predict at every position, IGNORED where there is no loss: the labels, moved up by one."""
    from torch.nn.functional import pad

    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def response_tokens(batch: Batch) -> int:
    """The tokens of a batch that carry a loss."""
    return int((targets(batch["labels"]) != IGNORED).sum())


def response_nats(model: Any, batch: Batch) -> "torch.Tensor":
    """The nats of every response token, row after row: shape (response tokens,), float32."""
    from torch.nn.functional import cross_entropy

    wanted = targets(batch["labels"])
    chosen = wanted != IGNORED
    with _head_sees(model, chosen):
        logits = model(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False).logits
    if logits.dim() == 3:
        logits = logits[chosen]
    return cross_entropy(logits.float(), wanted[chosen], reduction="none")


@contextmanager
def _head_sees(model: Any, chosen: "torch.Tensor") -> Iterator[None]:
    """Gives the model's head the chosen positions only: its logits are (chosen, vocabulary) meanwhile."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][chosen], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def response_bytes(batch: Batch, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The UTF-8 bytes of each row's response tokens that carry a loss, special tokens left out."""
    rows = targets(batch["labels"]).tolist()
    texts = (
        tokenizer.decode(
            [token for token in row if token != IGNORED], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row in rows
    )
    return [len(text.encode()) for text in texts]


@dataclass(frozen=True)
class LossSums:
    """Sums over samples (y nats, x response tokens of a sample) that a domain's loss follows from; they add up."""

    nats: float = 0.0
    tokens: float = 0.0
    bytes: float = 0.0
    samples: float = 0.0
    nats_squared: float = 0.0
    tokens_squared: float = 0.0
    nats_by_tokens: float = 0.0

    @classmethod
    def of(cls, batch: Batch, nats: "torch.Tensor", tokenizer: "PreTrainedTokenizerFast") -> Self:
        """The sums over a batch, given what response_nats made of it; sums in float64, token by token."""
        import torch

        chosen = targets(batch["labels"]) != IGNORED
        spread = torch.zeros(chosen.shape, dtype=torch.float64, device=nats.device)
        spread[chosen] = nats.detach().double()
        y, x = spread.sum(1).cpu().numpy(), chosen.sum(1).cpu().numpy().astype(np.float64)
        found = [y.sum(), x.sum(), sum(response_bytes(batch, tokenizer)), len(x), y @ y, x @ x, y @ x]
        return cls(*map(float, found))

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def loss(self) -> DomainLoss:
        """The domain's loss over all samples that were added."""
        return DomainLoss(
            nats=self.nats,
            tokens=int(self.tokens),
            bytes=int(self.bytes),
            samples=int(self.samples),
            standard_error=self._standard_error(),
        )

    def _standard_error(self) -> float | None:
        """Of r = Σy / Σx as a ratio estimator over n samples: √(n/(n-1) · Σ(y - r·x)²) / Σx (Cochran,
        Sampling Techniques, ch. 6)."""
        if self.samples < 2 or not self.tokens or not math.isfinite(self.nats):
            return None
        ratio = self.nats / self.tokens
        residual = self.nats_squared - 2 * ratio * self.nats_by_tokens + ratio**2 * self.tokens_squared
        return math.sqrt(self.samples / (self.samples - 1) * max(residual, 0.0)) / self.tokens
