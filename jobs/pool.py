"""Builds every domain's pool, one part of a source or one range of keys per Ray task.

python jobs/pool.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/pool.py --config "$PWD/mixture.yaml"
"""

import sys
from collections.abc import Iterator

from vtmix import job
from vtmix.artifacts import run_folder
from vtmix.pooling import build
from vtmix.settings import MixtureConfig


def work(config: MixtureConfig) -> Iterator[str]:
    """Builds the pools, and says what was read and committed."""
    pools = build(config, backend="ray")
    yield f"read      {config.model.name}; sources of {', '.join(config.domains)}"
    for domain, pool in pools.items():
        yield f"  {domain:<32} {pool.samples:,} samples, {pool.tokens:,} tokens, {pool.eval.samples:,} held out"
    yield f"committed {run_folder(config).pools}"


if __name__ == "__main__":
    sys.exit(job.run(job.parser("Encode every domain's records into its pool, by Ray.").parse_args(), work))
