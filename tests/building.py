"""Builds pools in forked children that can be made to die, as forking.py does with compiles.

    with Builds() as builds:
        end = builds.build(config, run, exit_at=17)

The parent of the children is this file run as a script. It has everything imported that a build needs, and no thread of
any library is alive when it forks. Requests are those of forking.py.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forking import End, start, wait

ENVIRONMENT = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Builds:
    """The process that forks."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def build(self, config: Path, run: Path, **request: Any) -> End:
        """One build of all pools of a run."""
        self._process.stdin.write(json.dumps({"arguments": [str(config), str(run)], **request}) + "\n")
        self._process.stdin.flush()
        return End(**json.loads(self._process.stdout.readline()))


def build_pools(arguments: list[str]) -> int:
    """What a child does."""
    from vtmix.config import load
    from vtmix.errors import VtmixError
    from vtmix.pooling import build

    try:
        build(load(*arguments), workers=1)
    except VtmixError as error:
        print(error)
        return 1
    return 0


@functools.cache
def warm_up(*arguments: str) -> None:
    """Imports what a build imports, but for what starts threads."""
    import rich._emoji_codes  # noqa: F401  (rich loads it at the first line it prints)

    import vtmix.pooling  # noqa: F401
    from vtmix.config import load
    from vtmix.encode import Encoder, load_tokenizer
    from vtmix.records import Turn

    config = load(*arguments)
    encoder = Encoder(load_tokenizer(config.model_location(config.model)), config.encoding)
    encoder.encode((Turn("user", "a"), Turn("assistant", "b")))


def serve() -> None:
    """Answers requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        warm_up(request["arguments"][0])
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            child = start(SimpleNamespace(main=build_pools), request["arguments"], Path(folder) / "0", request)
            if "kill_after" in request:
                time.sleep(request["kill_after"])
                os.kill(child[0], signal.SIGKILL)
            end = wait(*child, begun)
        print(json.dumps(end), flush=True)


if __name__ == "__main__":
    serve()
