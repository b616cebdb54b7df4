"""vLLM, run for real in its own environment, draws from the model's own softmax and reads judges' answers from it."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, sentence

from vtmix.config import load
from vtmix.encode import load_tokenizer
from vtmix.engine import RESERVED, require_free
from vtmix.errors import ConfigError, DetectionError
from vtmix.generate import sample_of, sampling
from vtmix.judge import EndpointJudge
from vtmix.question import ANSWER, inquiry, marker_tokens
from vtmix.samples import sample_seed
from vtmix.settings import Endpoint, Question, Vllm

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
QUICKSTART = ROOT / "examples" / "quickstart" / "model"
DOMAINS = list(WORDS)
QUESTION = {"permutations": 3, "options": {"code": "source code"}}
TEXTS = [
    "def read(path):\n    with open(path) as file:\n        return json.load(file)",
    "The court held that the defendant was liable for breach of contract and awarded damages.",
    "Patients with acute infection were given antibiotics, and their symptoms were recorded daily.",
    "",
    "{text} {options} }{ 🙂 <b>&amp;</b>",
    sentence("law", 1, 300),
]
KEY = "a-key-for-this-test"

needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM environment: make vllm-env")
needs_quickstart = pytest.mark.skipif(
    not QUICKSTART.exists(), reason="no model to judge: python examples/quickstart/fetch.py"
)
pytestmark = pytest.mark.slow


def seeds(count: int, start: int = 0) -> list[int]:
    return [sample_seed(7, 1, index) for index in range(start, start + count)]


def test_arguments_that_are_not_the_users_to_give_are_named():
    require_free(Vllm(kind="vllm", python="p", arguments={"gpu_memory_utilization": 0.8, "max_num_seqs": 4}))
    with pytest.raises(ConfigError, match="hold 'dtype', 'trust_remote_code', which vtmix sets itself"):
        require_free(Vllm(kind="vllm", python="p", arguments={"trust_remote_code": True, "dtype": "auto"}))
    assert {"model", "generation_config", "logits_processors"} <= RESERVED


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Two tiny models: one whose tokenizer adds its BOS and whose defaults would bend samples, one without a BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    bent, bare = shutil.copytree(tiny_model, folder / "bent"), shutil.copytree(tiny_model, folder / "bare")
    defaults = json.loads((bent / "generation_config.json").read_text())
    defaults |= {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "min_length": 16}
    (bent / "generation_config.json").write_text(json.dumps(defaults))
    adding = AutoTokenizer.from_pretrained(bent)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    adding.save_pretrained(bent)
    without = AutoTokenizer.from_pretrained(bare)
    without.bos_token = None
    without.save_pretrained(bare)
    return {"bent": bent, "bare": bare}


@pytest.fixture(scope="module")
def samplings(models, tmp_path_factory):
    """What is sampled from each model."""
    found = {}
    for name, path in models.items():
        file = tmp_path_factory.mktemp("config") / "mixture.yaml"
        file.write_text(
            json.dumps(
                {
                    "model": str(path),
                    "domains": {"law": {"train": "law.jsonl"}},
                    "detection": {"max_tokens": 100, "precision": "fp32"},
                }
            )
        )
        found[name] = sampling(load(file))
    return found


@pytest.fixture(scope="module")
def found(samplings, tmp_path_factory):
    """What one process of vLLM's environment drew and judged."""
    folder = tmp_path_factory.mktemp("inside")
    block = seeds(16)
    blocks = {"first": block, "other": seeds(16, start=16), "again": block, "reversed": block[::-1]}
    draw = {
        name: {
            "sampling": dataclasses.asdict(found),
            "blocks": blocks,
            "singles": seeds(6000) if name == "bent" else [],
        }
        for name, found in samplings.items()
    }
    judge = {"settings": {"kind": "judge", **QUESTION}, "model": str(QUICKSTART), "domains": DOMAINS, "texts": TEXTS}
    (folder / "asked.json").write_text(json.dumps({"draw": draw, "judge": judge if QUICKSTART.exists() else None}))
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "vllm_inside.py", folder / "asked.json", folder / "found.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@needs_vllm
def test_a_model_or_an_argument_that_vllm_cannot_take_is_refused_in_one_line(found):
    absent, nonsense = found["refusals"]
    assert "/bent/absent': " in absent
    assert "unexpected keyword argument 'nonsense'" in nonsense
    assert all(message.startswith("vLLM cannot load ") and "\n" not in message for message in (absent, nonsense))


@needs_vllm
@pytest.mark.parametrize("name", ["bent", "bare"])
def test_equal_seeds_give_equal_samples_whichever_block_comes_first(found, name):
    blocks = found[name]["blocks"]
    assert blocks["again"] == blocks["first"]
    assert blocks["reversed"] == blocks["first"][::-1]
    texts = [text for text, _, _ in blocks["first"] + blocks["other"]]
    assert len(set(texts)) == 32


@needs_vllm
@pytest.mark.parametrize(("name", "start"), [("bent", 0), ("bare", 2)])
def test_the_prompt_is_the_start_token_alone(found, samplings, name, start):
    assert samplings[name].start_id == start
    assert found[name]["prompts"] == [[start]]


@needs_vllm
@pytest.mark.parametrize("name", ["bent", "bare"])
def test_samples_end_and_read_as_those_of_transformers_do(found, samplings, name):
    settings = samplings[name]
    tokenizer = load_tokenizer(settings.model)
    drawn = [sample for block in found[name]["blocks"].values() for sample in block]
    assert {reason for _, _, reason in drawn} == {"length", "stop"}
    for text, ids, reason in drawn:
        assert not set(settings.stop_ids) & set(ids)
        assert (len(ids) == settings.max_tokens) == (reason == "length")
        assert sample_of(ids, settings, tokenizer).text == text


@needs_vllm
def test_first_tokens_follow_the_models_softmax_whatever_its_defaults(found, samplings):
    import torch
    from transformers import AutoModelForCausalLM

    settings, drawn = samplings["bent"], found["bent"]["singles"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(settings.model)(torch.tensor([[settings.start_id]])).logits[0, -1]
    expected = torch.softmax(logits.double(), -1).numpy() * len(drawn)
    counts = np.bincount([ids[0] for ids in drawn if ids], minlength=len(expected))
    stops = list(settings.stop_ids)
    kept = np.setdiff1d(np.arange(len(expected)), stops)
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    # 509 degrees of freedom: mean 509, standard deviation 32.
    assert 509 - 5 * 32 < chi_square < 509 + 5 * 32
    assert abs(len(drawn) - counts.sum() - expected[stops].sum()) < 5 * np.sqrt(expected[stops].sum())


# Judges.


def oracle(texts: list[str], *, chat: bool) -> np.ndarray:
    """The rows of a judge, computed with transformers in single precision."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, asked = load_tokenizer(str(QUICKSTART)), inquiry(Question(**QUESTION), DOMAINS, 400)
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    tokens = marker_tokens(tokenizer, asked.markers)
    answers = np.zeros((len(texts), len(asked.orders), len(DOMAINS)))
    for row, text in enumerate(texts):
        for turn, prompt in enumerate(asked.ask(text)):
            message = [{"role": "user", "content": prompt}]
            whole = (
                tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
                if chat
                else prompt + ANSWER
            )
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.inference_mode():
                shares = torch.softmax(model(ids).logits[0, -1].double(), -1)
            answers[row, turn] = [shares[own].sum().item() for own in tokens]
    return asked.tally(answers)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The URL of vLLM's own OpenAI-compatible server with the quickstart's model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": QUICKSTART,
        "served-model-name": "judge",
        "host": "127.0.0.1",
        "port": port,
        "api-key": KEY,
        "dtype": "float32",
        "max-model-len": 2048,
        "kv-cache-memory-bytes": 1 << 28,
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdout=file,
            stderr=file,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        while not healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end(process)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def end(process: subprocess.Popen) -> None:
    """Ends a process and those of its session."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def endpoint(url: str, **settings) -> EndpointJudge:
    return EndpointJudge(Endpoint(kind="endpoint", url=url, model="judge", **QUESTION, **settings), DOMAINS, 400)


@needs_vllm
@needs_quickstart
def test_a_judge_in_vllm_gives_the_probabilities_of_the_models_next_token(found):
    rows = np.array(found["judge"]["rows"])
    np.testing.assert_allclose(rows, oracle(TEXTS, chat=True), atol=1e-3)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-12)
    assert rows[TEXTS.index("")].tolist() == [0, 0, 0, 1]
    assert rows[:3, :3].sum(axis=1).min() > 0.1  # there is something to compare
    np.testing.assert_allclose(found["judge"]["alone"], rows[:2], atol=1e-5)
    assert found["judge"]["blank"] == [[0, 0, 0, 1]] * 2
    assert found["judge"]["none"] == [0, 4]


@needs_vllm
@needs_quickstart
def test_a_judge_behind_vllms_server_agrees_with_it(found, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    np.testing.assert_allclose(endpoint(server, key="JUDGE_KEY")(TEXTS), found["judge"]["rows"], atol=1e-2)


@needs_vllm
@needs_quickstart
def test_so_it_does_without_a_chat_template(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    rows = endpoint(server, key="JUDGE_KEY", api="completions")(TEXTS)
    np.testing.assert_allclose(rows, oracle(TEXTS, chat=False), atol=5e-3)
    assert rows[:3, :3].sum(axis=1).min() > 0.02


@needs_vllm
@needs_quickstart
@pytest.mark.parametrize(("settings", "status"), [({"key": "WRONG_KEY"}, 401), ({"key": "JUDGE_KEY"}, 404)])
def test_vllms_server_refuses_a_wrong_key_or_model(server, monkeypatch, settings, status):
    monkeypatch.setenv("WRONG_KEY", "wrong-key-of-this-test")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = EndpointJudge(Endpoint(kind="endpoint", url=server, model="nobody", **settings), DOMAINS, 400)
    with pytest.raises(DetectionError, match=f"Error code: {status}") as error:
        judge(["about law"])
    assert "wrong-key-of-this-test" not in str(error.value)
    assert KEY not in str(error.value)
