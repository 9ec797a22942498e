"""Run a grid's jobs in processes on this machine."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import traceback
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.experiments.jobs import Job, JobGraph, Listener, result_directory
from stayaligned.experiments.pipeline import run_stages
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.store import Store
from stayaligned.experiments.stages.train import train


def default_workers() -> int:
    """Return one process per core without a GPU, and one process with a GPU, whose memory processes would share."""
    if Path("/dev/nvidia0").exists():
        return 1
    return max(1, len(os.sched_getaffinity(0)))


def execute(graph: JobGraph, workers: int, plugins: Sequence[Path], listener: Listener) -> dict[str, str]:
    """Run every job of a graph.

    Args:
        graph: the jobs and their order.
        workers: number of processes.
        plugins: plug-in files that each process loads.
        listener: receives progress.

    Returns:
        The error of each job that failed, or that was skipped because a job that it requires failed.

    Raises:
        StayalignedError: if a process was killed.
    """
    try:
        with _open_pool(min(workers, len(graph.jobs)) or 1, plugins, listener) as pool:
            return _run_jobs(graph, pool, listener)
    except BrokenProcessPool:
        raise StayalignedError(
            "a worker process was killed (out of memory?)",
            hint="Rerun the same command to continue; `--workers 1` needs less memory.",
        ) from None


def _run_jobs(graph: JobGraph, pool: ProcessPoolExecutor, listener: Listener) -> dict[str, str]:
    order = TopologicalSorter(graph.requires)
    order.prepare()
    errors: dict[str, str] = {}
    running: dict[Future[None], str] = {}

    def finish(name: str) -> None:
        listener.finished(graph.jobs[name].title, errors.get(name))
        order.done(name)

    while order.is_active():
        for name in order.get_ready():
            failed = next((required for required in graph.requires[name] if required in errors), None)
            if failed is None:
                running[pool.submit(_run_job, graph.jobs[name])] = name
            else:
                errors[name] = errors[failed]
                finish(name)
        if not running:
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                future.result()
            except StayalignedError as error:
                errors[name] = str(error)
            finish(name)
    return errors


@contextlib.contextmanager
def _open_pool(workers: int, plugins: Sequence[Path], listener: Listener) -> Generator[ProcessPoolExecutor]:
    """Start worker processes that report to `listener` and that end when this process ends."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    ended = threading.Event()

    def relay() -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Empty):
                listener.progress(*messages.get(timeout=0.2))

    relay_thread = threading.Thread(target=relay, daemon=True)
    relay_thread.start()
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(messages, _threads_per_worker(workers), [*plugins]),
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        ended.set()
        relay_thread.join()
        messages.close()


def _threads_per_worker(workers: int) -> int:
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdecimal() and int(requested):
        return int(requested)
    return max(1, len(os.sched_getaffinity(0)) // workers)


# ---- in a worker process ---------------------------------------------------------------------------------------------

_messages: Any = None
_threads = 1


def _start_worker(messages: Any, threads: int, plugins: Sequence[Path]) -> None:
    global _messages, _threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    for plugin in plugins:
        load_plugin(plugin, REGISTRIES)
    _messages, _threads = messages, threads


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_job(job: Job) -> None:
    try:
        _run(job)
    except StayalignedError:
        raise
    except Exception as error:
        # Many exceptions can't be sent to another process, and one that can't would end the whole pool.
        path = job.out / "failures" / f"{job.name.replace(' ', '-')}.txt"
        write_text(path, traceback.format_exc())
        raise StayalignedError(f"{type(error).__name__}: {error}", hint=f"The whole traceback: {path}") from None


def _run(job: Job) -> None:
    context = Context(
        job.experiment, Store(job.out), progress=functools.partial(_send_progress, job.title), threads=_threads
    )
    if job.kind == "testbed":
        _ = context.resolved
    elif job.kind == "train":
        train(context)
    else:
        run_stages(context, result_directory(job.out, job.experiment, context.plan), position=job.position)


def _send_progress(title: str, work: str, share: float, detail: str = "", /) -> None:
    _messages.put((os.getpid(), f"{title} · {work}", share, detail))
