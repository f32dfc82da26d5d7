"""Work spread over the CPUs of the job, results in the order of the tasks."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nanochat.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def cpus() -> int:
    """CPUs that this process may use: its affinity, and what SLURM gave the task where that is less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(available, int(given)) if given.isdigit() else available)


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """function(task) of each task, in order; with `workers` processes, or right here when one is enough.

    At most two tasks a worker are under way, so that a caller who stops early wastes little and the results never pile up.
    Raises what a task raises; UserError when a process was killed.
    """
    tasks = iter(tasks)
    if workers <= 1:
        yield from map(function, tasks)
        return
    # spawn: forking a process whose libraries run threads (Arrow, tokenizers) can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    pending: list[Future[Result]] = []
    try:
        pending = [pool.submit(function, task) for task in itertools.islice(tasks, 2 * workers)]
        while pending:
            result = pending.pop(0).result()
            pending.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
            yield result
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of {workers} was killed; most often memory ran out. Give the job more memory or fewer CPUs."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: it ends when the parent does."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
