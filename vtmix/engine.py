"""vLLM in this process, set up to give equal answers to equal calls, to report to nobody, and to keep quiet.

It runs in an environment of its own (vtmix/environments.py): what starts it is constructed in an actor there.
"""

import os
from typing import TYPE_CHECKING, Any, Literal

from vtmix.errors import ConfigError
from vtmix.settings import VllmEnvironment

if TYPE_CHECKING:
    from vllm import LLM

Precision = Literal["bf16", "fp16", "fp32"]

DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

KV_CACHE = 2 << 30
"""Bytes for keys and values on CPUs, where vLLM would take most of the memory: enough for a block of 256 texts of 256
tokens of a model of 135 million parameters, which takes more turns with less."""

LONGEST_REASON = 300
"""Characters of an error of somebody else's that ours repeat."""

# What other settings say, what would bend the distribution, what would run code, and what no file should hold.
RESERVED = frozenset(
    {
        "allowed_local_media_path",
        "code_revision",
        "dtype",
        "generation_config",
        "hf_overrides",
        "hf_token",
        "kv_transfer_config",
        "logits_processors",
        "logprobs_mode",
        "max_logprobs",
        "max_model_len",
        "model",
        "override_generation_config",
        "revision",
        "scheduler_cls",
        "skip_tokenizer_init",
        "tensor_parallel_size",
        "tokenizer",
        "tokenizer_revision",
        "trust_remote_code",
        "worker_cls",
        "worker_extension_cls",
    }
)


# What says how the work is carried out. All else may change what comes out.
STEERING = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "swap_space",
        "use_tqdm_on_load",
    }
)


def shaping(settings: object) -> dict[str, Any]:
    """The `arguments` that may change what an engine says: part of what samples and judgements are made from."""
    if not isinstance(settings, VllmEnvironment):
        return {}
    found = {name: value for name, value in settings.arguments.items() if name not in STEERING}
    return {"arguments": found} if found else {}


def require_free(settings: VllmEnvironment) -> None:
    """Raises ConfigError naming every engine argument in `arguments` that is not the user's to give."""
    taken = sorted(RESERVED & settings.arguments.keys())
    if taken:
        raise ConfigError(
            f"arguments for vLLM hold {', '.join(map(repr, taken))}, which vtmix sets itself or keeps as they are: "
            "remove them (model, precision, tensor_parallel and max_tokens are settings of their own)"
        )


def start(model: str, revision: str | None, precision: Precision, longest: int, settings: VllmEnvironment) -> "LLM":
    """A model in vLLM for sequences of at most `longest` tokens; it changes this process's environment variables.

    Raises ConfigError when an argument is not the user's to give, or vLLM cannot load the model as asked.
    """
    require_free(settings)
    _prepare()
    from vllm import LLM
    from vllm.platforms import current_platform

    chosen: dict[str, Any] = {
        # Else what earlier calls left in the cache would decide how a prompt is computed.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        # Compiling takes longer than it saves on texts of this length.
        chosen |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE}
    if settings.tensor_parallel > 1:
        chosen |= {"distributed_executor_backend": "mp"}  # on the GPUs this actor has, not on Ray's others
    chosen |= settings.arguments
    try:
        return LLM(
            model=model,
            revision=revision,
            tokenizer_revision=revision,
            trust_remote_code=False,
            dtype=DTYPES[precision],
            max_model_len=longest,
            tensor_parallel_size=settings.tensor_parallel,
            generation_config="vllm",  # its own neutral defaults, not the model's
            **chosen,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ConfigError(f"vLLM cannot load {model!r}: {reason}: see to the model and to `arguments`") from None


def _prepare() -> None:
    """Sets what vLLM reads from the environment when it is imported."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine in a process of its own takes longer to start than a small block, and shared memory that it may leave.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
