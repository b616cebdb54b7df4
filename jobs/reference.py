"""Measures the mastery ceiling, one domain per Ray task.

python jobs/reference.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/reference.py --config "$PWD/mixture.yaml"
"""

import argparse
import sys

from vtmix.artifacts import run_folder
from vtmix.config import load
from vtmix.errors import VtmixError
from vtmix.reference import build


def main() -> int:
    """Runs the job and says what it read and committed; a mistake is one message and an exit code."""
    parser = argparse.ArgumentParser(description="Measure the reference loss of every domain, by Ray.")
    parser.add_argument("--config", help="default: ./mixture.yaml")
    parser.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.run)
        reference = build(config, backend="ray")
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    run = run_folder(config)
    model = config.reference.model or config.model
    print(f"read      {model.name}; pools of {', '.join(config.domains)}")
    for domain, loss in reference.domains.items():
        print(f"  {domain:<32} {loss.per_token:.4f} nats per token, lowest after epoch {loss.epoch}")
    print(f"committed {run.reference}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
