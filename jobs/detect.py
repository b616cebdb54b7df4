"""Detects what the model knows (Algorithm 1), as a Ray job.

python jobs/detect.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/detect.py --config "$PWD/mixture.yaml"
"""

import argparse
import sys

from vtmix.artifacts import run_folder
from vtmix.config import load
from vtmix.detect import detect
from vtmix.errors import VtmixError


def main() -> int:
    """Runs the job and says what it read and committed; a mistake is one message and an exit code."""
    parser = argparse.ArgumentParser(description="Detect what the model knows, by Ray.")
    parser.add_argument("--config", help="default: ./mixture.yaml")
    parser.add_argument("--run", help="the run folder; default: the one mixture.yaml names")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.run)
        report = detect(config)
    except VtmixError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    run = run_folder(config)
    print(f"read      {config.model.name}; pools of {', '.join(config.domains)} in {run.pools}")
    for domain, share in report.distribution.items():
        print(f"  {domain:<32} {share:7.2%}")
    print(f"committed {run.detection}: {report.samples:,} samples, {report.unclassified:.2%} unclassified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
