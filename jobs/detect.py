"""Detects what the model knows (Algorithm 1), as a Ray job.

python jobs/detect.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/detect.py --config "$PWD/mixture.yaml"
"""

import sys
from collections.abc import Iterator

from vtmix import job
from vtmix.artifacts import run_folder
from vtmix.detect import detect
from vtmix.settings import MixtureConfig


def work(config: MixtureConfig) -> Iterator[str]:
    """Detects, and says what was read and committed."""
    report, run = detect(config), run_folder(config)
    yield f"read      {config.model.name}; pools of {', '.join(config.domains)} in {run.pools}"
    for domain, share in report.distribution.items():
        yield f"  {domain:<32} {share:7.2%}"
    yield f"committed {run.detection}: {report.samples:,} samples, {report.unclassified:.2%} unclassified"


if __name__ == "__main__":
    sys.exit(job.run(job.parser("Detect what the model knows, by Ray.").parse_args(), work))
