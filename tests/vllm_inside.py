"""Run by the interpreter of vLLM's environment, for test_vllm.py: draws and judges what a file asks for.

python tests/vllm_inside.py asked.json found.json
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

from vtmix import engine
from vtmix.errors import ConfigError
from vtmix.generate import Sampling, VllmGenerator
from vtmix.judge import VllmJudge
from vtmix.settings import Judge, Vllm

SMALL = {"kv_cache_memory_bytes": 1 << 27}


def draw(sampling: dict[str, Any], blocks: dict[str, list[int]], singles: list[int]) -> dict[str, Any]:
    """Blocks of samples, in order; the prompts that reached the engine; samples of one token."""
    settings = Sampling(**{**sampling, "stop_ids": tuple(sampling["stop_ids"])})
    generator = VllmGenerator(settings, Vllm(kind="vllm", python=sys.executable, arguments=SMALL))
    generate, prompts = generator._engine.generate, []

    def spy(*arguments: Any, **settings: Any) -> Any:
        outputs = generate(*arguments, **settings)
        prompts.extend(output.prompt_token_ids for output in outputs)
        return outputs

    generator._engine.generate = spy
    found = {name: [dataclasses.astuple(sample) for sample in generator(seeds)] for name, seeds in blocks.items()}
    generator._sampling = dataclasses.replace(settings, max_tokens=1)
    return {
        "blocks": found,
        "prompts": [list(prompt) for prompt in {tuple(prompt) for prompt in prompts}],
        "singles": [sample.token_ids for sample in generator(singles)] if singles else [],
    }


def refusals(model: str) -> list[str]:
    """What is said of a model that is not there, and of an argument vLLM does not know."""
    found = []
    for name, arguments in ((f"{model}/absent", {}), (model, {"nonsense": 1})):
        try:
            engine.start(name, None, "fp32", 16, Vllm(kind="vllm", python=sys.executable, arguments=arguments))
        except ConfigError as error:
            found.append(str(error))
    return found


def judge(settings: dict[str, Any], model: str, domains: list[str], texts: list[str]) -> dict[str, Any]:
    """Rows of texts together, alone, and of none; settings hold an engine argument of the test's own."""
    found = VllmJudge(
        Judge(**{**settings, "python": sys.executable, "arguments": SMALL}), model, None, "fp32", domains, 400
    )
    return {
        "rows": found(texts).tolist(),
        "alone": [found([text]).tolist()[0] for text in texts[:2]],
        "blank": found(["", "\n"]).tolist(),
        "none": list(found([]).shape),
    }


def main() -> None:
    """One engine after the other: vLLM's state of a process is taken down with the engine that made it."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"refusals": refusals(asked["draw"]["bent"]["sampling"]["model"])}
    for name, request in asked["draw"].items():
        found[name] = draw(**request)
        gc.collect()
    if asked["judge"]:
        found["judge"] = judge(**asked["judge"])
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
