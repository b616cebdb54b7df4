"""What Ray does for itself beside a pipeline gives way to the stages, which do the work.

Ray's bookkeepers and a pipeline's loop in the driver need little, but ask for it a thousand times a second. A model
whose threads work in step on all cores waits each time for the one that was interrupted: on two cores, an eighth of
its speed is lost. Linux's policy SCHED_IDLE (sched(7)) is for such work: it is done where a core has nothing else to
do. Anyone may give it to a thread of their own; only with privileges is it taken back.
"""

import os
import threading
import time
from contextlib import suppress
from typing import Any

BOOKKEEPERS = (
    "ray::_StatsActor",
    "ray::ActorLocationTracker",
    "ray::_AutoscalingCoordinatorActor",
    "ray::DashboardAgent",
    "ray/_private/log_monitor.py",
    "ray/dashboard/dashboard.py",
    "ray/autoscaler/_private/monitor.py",
)
"""Processes whose work may be late by seconds; never those that have to answer (raylet, GCS), nor the stages."""
POLLING = "iter_threaded"
"""The thread in which Ray Data looks a hundred times a second whether there is a result."""
STEP = 0.1
"""Seconds that a step of a pipeline's loop takes in which nothing is finished."""
LONGER = 0.02
"""Seconds by which the loop pauses longer after every such step."""
LONGEST = 0.4
"""Seconds of the longest pause; the loop of a pipeline that comes to it has long blocks, and gives way for good."""


def give_way(context: Any) -> None:
    """Has Ray give way while pipelines of this Ray Data context run."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class GiveWay(ExecutionCallback):  # type: ignore[misc]
        """Called by a pipeline's loop, in its thread."""

        def __init__(self) -> None:
            self._steps = 0
            self._pause = 0.0
            self._ended = time.monotonic()

        def on_execution_step(self, executor: object) -> None:
            self._steps += 1
            if self._steps & (self._steps - 1) == 0:  # ever more rarely: the bookkeepers appear one after the other
                idle_bookkeepers()
            finished = time.monotonic() - self._ended < STEP
            self._pause = 0.0 if finished else min(self._pause + LONGER, LONGEST)
            if self._pause == LONGEST:
                _idle(threading.get_native_id())
            time.sleep(self._pause)
            self._ended = time.monotonic()

    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, GiveWay]


def idle_bookkeepers() -> None:
    """Has what this process started for Ray's own sake compute only where a core has nothing else to do.

    On a cluster that was joined, the bookkeepers are not this process's own, and left as they are.
    """
    import psutil

    for thread in threading.enumerate():
        if thread.name == POLLING and thread.native_id:
            _idle(thread.native_id)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if any(name in part for name in BOOKKEEPERS for part in process.cmdline()):
                for task in process.threads():
                    _idle(task.id)


def _idle(thread: int) -> None:
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # it has ended meanwhile, or a sandbox forbids it: no reason to stop a pipeline
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
