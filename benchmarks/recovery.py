"""Does detection find what a model knows? On models whose knowledge is known, since they were trained here.

    python benchmarks/recovery.py [--quick] [--json] [--data FOLDER]

For each of several skewed mixtures of domains, a small Llama is trained from scratch on documents in exactly those
proportions, each training row one document behind the start token, and then detected like any model. Reported are the
total variation distances between the mixture and the detection, as classified and corrected, the same with the 95 %
intervals of every domain's share, and how many of these intervals hold the truth. What a model that was trained for
minutes writes is only like its training text, so part of the distance is the model's, and part the sampling's.

A document is drawn from the mixture as a whole, so a sample of a model that has learned how documents begin is a sample
of the domains' openings in the mixture's proportions, continued by the model. That is why the control group's openings
are short here: such a model knows the first few tokens of a document far better than what follows them.

Samples are drawn with vLLM where `make vllm-env` has been run, else with transformers, which takes longer.
The corpus is a folder of <domain>/train.jsonl with prompts and responses, or the quickstart's.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shared import CORPUS, ROOT, corpus, end, run

from vtmix import config, progress
from vtmix.artifacts import DetectionReport
from vtmix.detect import detect
from vtmix.errors import VtmixError
from vtmix.plan import Arrangement, apportion
from vtmix.pooling import build

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
    texts: dict[str, list[str]], truth: dict[str, float], tokenizer: "PreTrainedTokenizerFast", options: Any
) -> Iterator[list[list[int]]]:
    """Batches of documents in the truth's proportions, arranged as vtmix arranges an epoch."""
    counts = apportion(truth, options.steps * options.batch)
    order = Arrangement(tuple(truth), tuple(counts.values()), options.seed)
    domains, places = order.stretch(0, order.samples)
    rng = np.random.default_rng(options.seed)
    shuffled = {domain: rng.permutation(len(found)) for domain, found in texts.items()}
    names = list(truth)
    batch = []
    for number, place in zip(domains.tolist(), places.tolist(), strict=True):
        domain = names[number]
        text = texts[domain][shuffled[domain][place % len(texts[domain])]]
        ids = tokenizer(f"{START}{text}{END}", add_special_tokens=False).input_ids
        batch.append(ids[: options.tokens + 1])
        if len(batch) == options.batch:
            yield batch
            batch = []


def train(
    texts: dict[str, list[str]], truth: dict[str, float], tokenizer: "PreTrainedTokenizerFast", options: Any
) -> "LlamaForCausalLM":
    """A Llama of a few million parameters, trained from scratch; the learning rate ends at 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=options.tokens + 1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.05, final_div_factor=1e6
    )
    with progress.bar("train", options.steps, "steps") as advance:
        for batch in rows(texts, truth, tokenizer, options):
            width = max(map(len, batch))
            ids = torch.full((len(batch), width), tokenizer.pad_token_id)
            labels = torch.full((len(batch), width), -100)
            for line, found in enumerate(batch):
                ids[line, : len(found)] = labels[line, : len(found)] = torch.tensor(found)
            # Rows are padded at their ends, where no token of theirs looks.
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            advance(1)
    print(f"  trained: loss {loss.item():.3f} nats per token on the last batch")
    return model


def detected(folder: Path, model: Path, files: dict[str, Path], options: Any) -> DetectionReport:
    """The detection of a model, with a classifier fitted on the corpus."""
    engine = {"kind": "vllm", "python": str(VLLM)} if VLLM.exists() else {"kind": "transformers"}
    settings = config.validate(
        {
            "model": str(model),
            "run": folder.name,
            "seed": options.seed,
            "domains": {domain: {"train": str(path)} for domain, path in files.items()},
            "pool": {"folder": "pool", "leak": "drop"},
            "encoding": {"template": "plain"},
            "detection": {
                "iterations": 4,
                "samples": -(-options.samples // 4),
                "max_tokens": options.tokens,
                "precision": "fp32",
                "engine": engine,
                "control": options.control,
                "opening": options.opening,
                "correct": True,
            },
        },
        folder.parent / "mixture.yaml",
    )
    build(settings)
    return detect(settings)


def distance(truth: dict[str, float], found: dict[str, float]) -> float:
    """Total variation distance."""
    return sum(abs(truth[domain] - found[domain]) for domain in truth) / 2


def measured(truth: dict[str, float], report: DetectionReport) -> dict[str, Any]:
    """How far a detection is from the truth, and whether it knows."""
    total = sum(share.mean for share in report.shares.values())
    raw = {domain: share.mean / total for domain, share in report.shares.items()}
    corrected = {domain: share.mean for domain, share in report.corrected.items()}
    for domain, share in report.corrected.items():
        print(
            f"  {domain:<10} truth {truth[domain]:.3f}  as classified {raw[domain]:.3f}  "
            f"corrected {share.mean:.3f} ({share.low:.3f} to {share.high:.3f})"
        )
    held = [share.low <= truth[domain] <= share.high for domain, share in report.corrected.items()]
    return {
        "tv_raw": distance(truth, raw),
        "tv_corrected": distance(truth, corrected),
        "coverage95": sum(held) / len(held),
        "samples": report.samples,
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line")
    parser.add_argument("--quick", action="store_true", help="one mixture, a few steps: does it run?")
    parser.add_argument("--data", type=Path, default=CORPUS, help="folder of <domain>/train.jsonl")
    parser.add_argument("--folder", type=Path, help="where models and detections are kept (default: nowhere)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=12_288, help="per mixture")
    parser.add_argument("--control", type=int, default=1536, help="samples per domain that measure the classifier")
    parser.add_argument("--opening", type=int, default=3, help="tokens of a text that each of those continues")
    parser.add_argument("--tokens", type=int, default=128, help="of a training row and of a sample")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    truths: tuple[dict[str, float], ...] = TRUTHS
    if options.quick:
        truths, options.steps, options.samples, options.tokens = TRUTHS[:1], 60, 128, 32
        options.control = 16
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        files = sources(options.data)
        texts = {domain: documents(path) for domain, path in files.items()}
        tokenizer = make_tokenizer(texts)
        for number, truth in enumerate(truths, start=1):
            print(f"mixture {number} of {len(truths)}")
            model = folder / f"model-{number}"
            start = time.perf_counter()
            if not (model / "config.json").exists():
                tokenizer.save_pretrained(model)
                train(texts, truth, tokenizer, options).save_pretrained(model)
            trained = time.perf_counter()
            found = measured(truth, detected(folder / f"run-{number}", model, files, options))
            seconds = {"train_s": trained - start, "detect_s": time.perf_counter() - trained}
            figures.append(found | seconds)
            print("  " + ", ".join(f"{name} {value:.4g}" for name, value in figures[-1].items()))
    return end({name: [found[name] for found in figures] for name in figures[0]}, as_json=options.json)


if __name__ == "__main__":
    run(main)
