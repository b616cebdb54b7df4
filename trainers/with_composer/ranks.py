"""The processes that train together: what they need to agree on, and what rank 0 does for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.utils import dist, get_device

from vtmix.errors import ConfigError, VtmixError
from vtmix.settings import MixtureConfig

Result = TypeVar("Result")

# Ranks wait for rank 0 while it writes an epoch's shards; a rank that dies is noticed by the launcher, not by this.
TIMEOUT_SECONDS = 12 * 3600.0


def start_ranks(config: MixtureConfig) -> None:
    """Connects the ranks to each other.

    Raises ConfigError when the device, precision or batch sizes cannot be used on them.
    """
    settings, device = config.training, device_of(config)
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("training.device is 'gpu' but torch sees none: use 'auto' or 'cpu'")
    if device == "cpu" and settings.precision not in ("auto", "fp32"):
        raise ConfigError(f"training.precision {settings.precision!r} needs a GPU: on CPUs use 'auto' or 'fp32'")
    if device == "cpu" and settings.fsdp is not None:
        raise ConfigError("training.fsdp needs GPUs: set it to null")
    if (settings.fsdp or {}).get("state_dict_type", "full") != "full":
        raise ConfigError("training.fsdp.state_dict_type: checkpoints are one file each, so it has to be 'full'")
    ranks, packing = dist.get_world_size(), config.mixture.packing
    for name, value in (
        ("training.batch_size", settings.batch_size),
        ("mixture.packing.multiple", packing.multiple) if packing else ("samples_per_epoch", config.samples_per_epoch),
    ):
        if value % ranks:
            near = value - value % ranks or ranks
            raise ConfigError(f"{name} {value} cannot be divided among {ranks} ranks: set it to {near}, say")
    dist.initialize_dist(device, TIMEOUT_SECONDS)


def device_of(config: MixtureConfig) -> str:
    """cpu or gpu, in Composer's words."""
    wanted = config.training.device
    return str(get_device(None if wanted == "auto" else wanted).name)


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Calls a function on rank 0 while the others wait; every rank gets its result, or its refusal."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = function()
        except VtmixError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result
