"""Compiles in forked children that can be made to die, and reports how each ended.

    with Forks() as forks:
        end = forks.compile(config, 1, exit_at=17)

The parent of the children is this file run as a script, which imports vtmix once and nothing else: no thread of
another library is alive when it forks, and a trial costs milliseconds. It reads one request per line from stdin and
answers each by one line. Requests:

    arguments    of `python -m vtmix.compile`, one list per child; the children start together
    kill_after   seconds until SIGKILL
    exit_at      the file-system event at which the child ends at once, like a killed one
    fail_at      which event that takes space on the disk fails with ENOSPC
    largest      bytes no file may exceed (RLIMIT_FSIZE)

Events are Python's audit events, so nothing of vtmix is changed for the sake of the tests.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILLING = {"os.mkdir", "os.rename", "os.link"}
OTHERS = {"open", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir", "fcntl.flock"}


@dataclass(frozen=True)
class End:
    """How a child ended: its exit code (negative: the signal), what it printed, its file-system events, its pid."""

    code: int
    output: str
    events: int
    seconds: float
    pid: int


class Forks:
    """The process that forks."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def compile(self, config: Path, epoch: int, *, workers: int = 2, **request: Any) -> End:
        """One compile of an epoch."""
        return self.race(config, epoch, 1, workers=workers, **request)[0]

    def race(self, config: Path, epoch: int, count: int, *, workers: int = 2, **request: Any) -> list[End]:
        """Several compiles of an epoch at the same time."""
        arguments = ["--config", str(config), "--epoch", str(epoch), "--workers", str(workers)]
        self._process.stdin.write(json.dumps({"arguments": [arguments] * count, **request}) + "\n")
        self._process.stdin.flush()
        return [End(**end) for end in json.loads(self._process.stdout.readline())]


def serve() -> None:
    """Answers requests until stdin ends."""
    import rich._emoji_codes  # noqa: F401  (rich loads it at the first line it prints)

    from vtmix import compile as compiler

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            children = [
                start(compiler, arguments, Path(folder) / str(number), request)
                for number, arguments in enumerate(request["arguments"])
            ]
            begun = time.monotonic()
            if "kill_after" in request:
                time.sleep(request["kill_after"])
                for pid, *_ in children:
                    os.kill(pid, signal.SIGKILL)
            ends = [wait(*child, begun) for child in children]
        print(json.dumps(ends), flush=True)


def start(compiler: Any, arguments: list[str], report: Path, request: dict[str, Any]) -> tuple[int, int, Path]:
    """Forks a child that compiles: its pid, what it prints, and where it counts its events."""
    reading, output = os.pipe()  # not a file, which RLIMIT_FSIZE would cut
    if pid := os.fork():
        os.close(output)
        return pid, reading, report
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        events = count_events(request, report)
        if "largest" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], request["largest"]))
        code = compiler.main(arguments)
        events()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_events(request: dict[str, Any], report: Path) -> Any:
    """Counts file-system events from here on, and dies or fails at the one that is asked for."""
    state = {"all": 0, "filling": 0, "on": True}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not state["on"] or event not in FILLING | OTHERS:
            return
        state["all"] += 1
        if state["all"] == request.get("exit_at"):
            os._exit(137)
        if event in FILLING or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            state["filling"] += 1
            if state["filling"] == request.get("fail_at"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish() -> None:
        state["on"] = False
        if "largest" not in request:
            report.write_text(str(state["filling" if "fail_at" in request else "all"]))

    sys.addaudithook(hook)
    return finish


def wait(pid: int, reading: int, report: Path, begun: float) -> dict[str, Any]:
    """Waits for a child."""
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - begun
    with open(reading) as output:
        return {
            "code": os.waitstatus_to_exitcode(status),
            "output": output.read(),
            "events": int((report.read_text() if report.exists() else "") or 0),
            "seconds": seconds,
            "pid": pid,
        }


if __name__ == "__main__":
    serve()
