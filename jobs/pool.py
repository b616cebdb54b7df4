"""Builds every domain's pool, one part of a source or one range of keys per Ray task.

python jobs/pool.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/pool.py --config "$PWD/mixture.yaml"
"""

import argparse
import sys

from vtmix.artifacts import run_folder
from vtmix.config import load
from vtmix.errors import VtmixError
from vtmix.pooling import build


def main() -> int:
    """Runs the job and says what it read and committed; a mistake is one message and an exit code."""
    parser = argparse.ArgumentParser(description="Encode every domain's records into its pool, by Ray.")
    parser.add_argument("--config", help="default: ./mixture.yaml")
    parser.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.run)
        pools = build(config, backend="ray")
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"read      {config.model.name}; sources of {', '.join(config.domains)}")
    for domain, pool in pools.items():
        print(f"  {domain:<32} {pool.samples:,} samples, {pool.tokens:,} tokens, {pool.eval.samples:,} held out")
    print(f"committed {run_folder(config).pools}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
