"""Small models whose knowledge is known: Llamas trained from scratch on documents in given proportions of domains.

Each training row is one document behind the start token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from shared import ROOT, corpus

from vtmix import progress
from vtmix.errors import VtmixError
from vtmix.plan import Arrangement, apportion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, END = "<|endoftext|>", "<|end|>"
VOCABULARY = 4096
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
TRUTHS = (
    {"law": 0.08, "medicine": 0.30, "finance": 0.12, "science": 0.15, "code": 0.25, "other": 0.10},
    {"law": 0.35, "medicine": 0.05, "finance": 0.20, "science": 0.10, "code": 0.10, "other": 0.20},
    {"law": 0.10, "medicine": 0.15, "finance": 0.05, "science": 0.40, "code": 0.05, "other": 0.25},
)


def sources(data: Path) -> dict[str, Path]:
    """The training file of every domain of the mixtures."""
    found = corpus(data)
    missing = [domain for domain in TRUTHS[0] if domain not in found]
    if missing:
        raise VtmixError(
            f"no corpus of {', '.join(missing)} found in {data}: run examples/quickstart/fetch.py, or give --data"
        )
    return {domain: found[domain] for domain in TRUTHS[0]}


def engine() -> dict[str, str]:
    """What such a model is sampled with: vLLM where `make vllm-env` has been run, else transformers."""
    return {"kind": "vllm", "python": str(VLLM)} if VLLM.exists() else {"kind": "transformers"}


def documents(path: Path) -> list[str]:
    """Every record of a file as one text, as a pool keeps it."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [f"{record['prompt']}\n{record['response']}" for record in records]


def make_tokenizer(texts: dict[str, list[str]]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of the corpus, every domain counting alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped]
    from transformers import PreTrainedTokenizerFast

    fewest = min(map(len, texts.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for found in texts.values() for text in found[:fewest]), trainer)
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )
    return wrapped


def rows(
    texts: dict[str, list[str]],
    truth: dict[str, float],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    steps: int,
    batch: int,
    tokens: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Batches of documents in the truth's proportions, arranged as vtmix arranges an epoch."""
    counts = apportion(truth, steps * batch)
    order = Arrangement(tuple(truth), tuple(counts.values()), seed)
    domains, places = order.stretch(0, order.samples)
    rng = np.random.default_rng(seed)
    shuffled = {domain: rng.permutation(len(known)) for domain, known in texts.items()}
    names = list(truth)
    found = []
    for number, place in zip(domains.tolist(), places.tolist(), strict=True):
        domain = names[number]
        text = texts[domain][shuffled[domain][place % len(texts[domain])]]
        ids = tokenizer(f"{START}{text}{END}", add_special_tokens=False).input_ids
        found.append(ids[: tokens + 1])
        if len(found) == batch:
            yield found
            found = []


def pretrained(
    folder: Path,
    texts: dict[str, list[str]],
    truth: dict[str, float],
    *,
    steps: int,
    batch: int = 16,
    tokens: int = 128,
    lr: float = 2e-3,
    width: int = 256,
    seed: int = 1,
) -> Path:
    """A Llama of a few million parameters, trained from scratch, as a Hugging Face folder; one that is there is kept.

    It has 4 layers and a head for every 64 of its width. The learning rate ends at 0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            max_position_embeddings=tokens + 1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, final_div_factor=1e6
    )
    with progress.bar(f"train {folder.name}", steps, "steps") as advance:
        for found in rows(texts, truth, tokenizer, steps=steps, batch=batch, tokens=tokens, seed=seed):
            longest = max(map(len, found))
            ids = torch.full((batch, longest), tokenizer.pad_token_id)
            labels = torch.full((batch, longest), -100)
            for line, row in enumerate(found):
                ids[line, : len(row)] = labels[line, : len(row)] = torch.tensor(row)
            # Rows are padded at their ends, where no token of theirs looks.
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            advance(1)
    print(f"  trained: loss {loss.item():.3f} nats per token on the last batch")
    staging = folder.with_name(f"{folder.name}.part")
    tokenizer.save_pretrained(staging)
    model.save_pretrained(staging)
    staging.rename(folder)
    return folder
