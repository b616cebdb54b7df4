"""What the tests share: a tiny model with its own tokenizer, small texts of three domains, a mixture.yaml of them."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

import vtmix  # noqa: F401  (sets OMP_WAIT_POLICY before any library starts OpenMP)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # several processes of the suite share the cores
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes says more about what else the machine does.
settings.register_profile("vtmix", deadline=None)
settings.load_profile("vtmix")

LONGEST = ("test_readme.py", "test_crash.py", "test_detect_vllm.py", "test_ray_jobs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: where several processes share the files, none works at its end alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = {
    "law": "court statute plaintiff appeal contract liability judge clause tort evidence verdict counsel",
    "medicine": "patient dose symptom therapy clinical artery infection diagnosis tissue vaccine nurse chronic",
    "code": "def return class import lambda yield list dict tuple assert raise async",
}


def sentence(domain: str, index: int, length: int = 8) -> str:
    """A text of the domain's words, different for every index."""
    words = WORDS[domain].split()
    state = index * 2654435761 + 1
    chosen = []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        chosen.append(words[(state >> 33) % len(words)])
    return f"{' '.join(chosen)} {index}."


def records(domain: str, count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"Tell me: {sentence(domain, i, 4)}", "response": sentence(domain, i + 10_000, 5 + i % 9)}
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a byte-level BPE tokenizer of 512 tokens, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence(domain, i) for domain in WORDS for i in range(300)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,  # 32 dimensions each, the fewest that vLLM computes on CPUs
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes data of three domains and a mixture.yaml with the given overrides; returns the file's path."""

    def write(folder: Path = tmp_path, samples: int = 60, **overrides: Any) -> Path:
        for domain in WORDS:
            write_jsonl(folder / "data" / f"{domain}.jsonl", records(domain, samples))
        config: dict[str, Any] = {
            "model": str(tiny_model),
            "seed": 7,
            "epochs": 3,
            "samples_per_epoch": 48,
            "domains": {domain: {"train": f"data/{domain}.jsonl"} for domain in WORDS},
            "encoding": {"max_length": 64},
            "pool": {"eval_fraction": 0.2},
            "detection": {"iterations": 2, "samples": 32, "block": 8, "max_tokens": 16, "precision": "fp32"},
            "reference": {"epochs": 2, "samples": 16, "batch_size": 8, "lr": 3e-3},
            "training": {"batch_size": 8, "lr": 1e-3, "eval_batch_size": 8},
        }
        for key, value in overrides.items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        path = folder / "mixture.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


NODES_KEY = secrets.token_hex(24)
"""What the variable NODES_KEY holds where the session's cluster runs, and nowhere else."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One cluster for all tests of a session, with room for two generating actors."""
    from vtmix import cluster

    with ExitStack() as until_done:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("NODES_KEY", NODES_KEY)
            until_done.enter_context(cluster.connect(cpus=4))
        yield
