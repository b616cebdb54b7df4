"""Compiles an epoch's mixture, a Ray task per shard.

python jobs/compile.py --epoch 2 [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/compile.py --epoch 2 --config "$PWD/mixture.yaml"
"""

import argparse
import sys

from vtmix import cluster
from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch, summarise
from vtmix.config import load
from vtmix.errors import VtmixError


def main() -> int:
    """Runs the job and says what it committed; a mistake is one message and an exit code."""
    parser = argparse.ArgumentParser(description="Compile an epoch's mixture, by Ray.")
    parser.add_argument("--epoch", type=int, required=True, help="the epoch to compile, from 1")
    parser.add_argument("--config", help="default: ./mixture.yaml")
    parser.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    parser.add_argument("--workers", type=int, help="workers to keep busy; default: the cluster's CPUs")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.run)
        cluster.require_durable(run_folder(config))
        with cluster.connect():
            manifest, fresh = compile_epoch(config, arguments.epoch, arguments.workers, backend="ray")
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(summarise(manifest, config, fresh=fresh))
    return 0


if __name__ == "__main__":
    sys.exit(main())
