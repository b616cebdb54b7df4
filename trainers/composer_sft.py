"""The closed loop with Composer: train on an epoch's mixture, evaluate every domain, and let vtmix write the next one.

    python trainers/composer_sft.py mixture.yaml
    composer -n 8 trainers/composer_sft.py mixture.yaml

Run again after an interruption, it goes on at the exact sample; run again after the end, it says that all is done.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtmix.config import DEFAULT_PATH, load
from vtmix.errors import MissingError, VtmixError
from vtmix.settings import MixtureConfig

if TYPE_CHECKING:
    from with_composer.session import Session

    from vtmix.loop import Mixture


def main() -> int:
    """Reads the options, trains, and says where the model is; a refusal is one message and an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(DEFAULT_PATH), help="default: ./mixture.yaml")
    parser.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    options = parser.parse_args()
    try:
        config = load(options.config, options.run)
        done = is_done(config)
        model = model_folder(config) if done else train(config)
    except VtmixError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted: the last checkpoint stays; run again to go on")
        return 130
    say(f"all {config.epochs} epochs {'were done before' if done else 'are done'}: the model is in {model}")
    return 0


def train(config: MixtureConfig, callbacks: Sequence[Any] = ()) -> Path:
    """Runs the closed loop from where the run stands to its end; returns the trained model's folder.

    `callbacks` are further Composer callbacks.
    """
    from with_composer.ranks import on_rank_zero, start_ranks
    from with_composer.session import Session

    start_ranks(config)
    session = Session(config, on_rank_zero(lambda: newest_state(config)), callbacks)
    mixture = settle(config, session, session.epochs_done)
    while mixture is not None:
        session.fit(mixture)
        mixture = settle(config, session, mixture.epoch)
    session.export(model_folder(config))
    return model_folder(config)


def settle(config: MixtureConfig, session: "Session", epoch: int) -> "Mixture | None":
    """Commits the losses after an epoch (0: the base model's) and gives the next epoch's mixture, None at the end."""
    from with_composer.ranks import on_rank_zero

    from vtmix import loop

    committed = on_rank_zero(lambda: loop.losses_of(config, epoch))
    losses = committed.domains if committed else session.evaluate()
    return on_rank_zero(lambda: loop.advance(config, epoch, losses) if epoch else loop.begin(config, losses))


def newest_state(config: MixtureConfig) -> Path | None:
    """The state file to go on from, None at the very beginning.

    Raises MissingError without what the weights are made from, ConflictError when the configuration has changed or the
    state was trained on another mixture than the run folder holds, DamageError or MissingError when training would
    start afresh over what was done before.
    """
    from vtmix import checkpoints, loop
    from vtmix.artifacts import Manifest, run_folder
    from vtmix.compile import open_pools

    run = run_folder(config)
    open_pools(config)
    loop.require_ready(config)
    found = checkpoints.newest(run.checkpoints, say)
    if found is None:
        if loop.losses_of(config, 1) is not None:
            raise MissingError(
                f"{run.checkpoints} holds no checkpoint though epoch 1 was trained: restore one, or start another run "
                "folder"
            )
        return None
    state, checkpoint = found
    manifest = Manifest.read(run.manifest(checkpoint.epoch), "restore it, or start another run folder")
    checkpoints.require_mixture(checkpoint, manifest.digest())
    say(f"going on from the checkpoint after step {checkpoint.step} (epoch {checkpoint.epoch})")
    return state


def is_done(config: MixtureConfig) -> bool:
    """Whether the run's last artefact, the trained model, is there; it is committed after everything else.

    Raises ConflictError when the run was begun with another configuration.
    """
    if not model_folder(config).is_dir():
        return False
    from vtmix import loop

    loop.require_unchanged(config)
    return True


def model_folder(config: MixtureConfig) -> Path:
    """Where the trained model is published as a Hugging Face folder."""
    return config.resolve(config.run) / "model"


def say(text: str) -> None:
    """Prints a line on stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
