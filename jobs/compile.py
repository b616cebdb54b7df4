"""Compiles an epoch's mixture, a Ray task per shard.

python jobs/compile.py --epoch 2 [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/compile.py --epoch 2 --config "$PWD/mixture.yaml"
"""

import sys
from collections.abc import Iterator

from vtmix import cluster, job
from vtmix.artifacts import run_folder
from vtmix.compile import compile_epoch, summarise
from vtmix.settings import MixtureConfig


def main() -> int:
    """Compiles the epoch it is given, and says what was committed."""
    parser = job.parser("Compile an epoch's mixture, by Ray.")
    parser.add_argument("--epoch", type=int, required=True, help="the epoch to compile, from 1")
    parser.add_argument("--workers", type=int, help="workers to keep busy; default: the cluster's CPUs")
    arguments = parser.parse_args()

    def work(config: MixtureConfig) -> Iterator[str]:
        cluster.require_durable(run_folder(config))
        with cluster.connect():
            manifest, fresh = compile_epoch(config, arguments.epoch, arguments.workers, backend="ray")
        yield summarise(manifest, config, fresh=fresh)

    return job.run(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
