"""Measures the mastery ceiling, one domain per Ray task.

python jobs/reference.py [--config mixture.yaml] [--run FOLDER]
ray job submit --working-dir . -- python jobs/reference.py --config "$PWD/mixture.yaml"
"""

import sys
import time
from collections.abc import Iterator

from vtmix import job
from vtmix.artifacts import run_folder
from vtmix.reference import build, summary
from vtmix.settings import MixtureConfig


def work(config: MixtureConfig) -> Iterator[str]:
    """Measures the losses, and says what was read and committed."""
    start = time.monotonic()
    reference = build(config, backend="ray")
    model = config.reference.model or config.model
    yield f"read      {model.name}; pools of {', '.join(config.domains)}"
    for line in summary(reference):
        yield f"  {line}"
    yield f"took      {time.monotonic() - start:,.1f} s"
    yield f"committed {run_folder(config).reference}"


if __name__ == "__main__":
    sys.exit(job.run(job.parser("Measure the reference loss of every domain, by Ray.").parse_args(), work))
