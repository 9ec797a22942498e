"""Run a grid's jobs in processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.experiments.jobs import Job, Listener, run_directory
from stayaligned.experiments.pipeline import Run
from stayaligned.experiments.stages.store import Store


def default_workers() -> int:
    """One process a core without a GPU; one in all with one, since processes would share its memory."""
    if Path("/dev/nvidia0").exists():
        return 1
    return max(1, len(os.sched_getaffinity(0)))


def execute(
    jobs: Mapping[str, Job],
    graph: Mapping[str, set[str]],
    workers: int,
    plugins: Sequence[Path],
    listener: Listener,
) -> dict[str, str]:
    """Run the graph; returns the error of each job that failed or could not start because of one that did."""
    order = TopologicalSorter({name: edges & graph.keys() for name, edges in graph.items()})
    order.prepare()
    errors: dict[str, str] = {}
    with _pool(min(workers, len(graph)) or 1, plugins, listener) as pool:
        running: dict[Future[None], str] = {}
        while order.is_active():
            for name in order.get_ready():
                failed = next((edge for edge in graph[name] if edge in errors), None)
                if failed is None:
                    running[pool.submit(_work, jobs[name])] = name
                else:
                    errors[name] = errors[failed]
                    listener.finished(jobs[name].title, errors[name])
                    order.done(name)
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    future.result()
                except StayalignedError as error:
                    errors[name] = str(error)
                listener.finished(jobs[name].title, errors.get(name))
                order.done(name)
    return errors


@contextlib.contextmanager
def _pool(workers: int, plugins: Sequence[Path], listener: Listener) -> Generator[ProcessPoolExecutor]:
    """Worker processes that report to `listener`, and that die with this one."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else max(1, cores // workers)
    ended = threading.Event()

    def relay() -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Empty):
                listener.progress(*messages.get(timeout=0.2))

    relay_thread = threading.Thread(target=relay, daemon=True)
    relay_thread.start()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(messages, threads, [*plugins])
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


_report: Callable[[str, float], None] = lambda _text, _share: None  # noqa: E731


_threads = 1


def _start_worker(messages: Any, threads: int, plugins: Sequence[Path]) -> None:
    global _report, _threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for plugin in plugins:
        load_plugin(plugin, REGISTRIES)
    worker = os.getpid()
    _threads = threads
    _report = lambda text, share: messages.put((worker, text, share))  # noqa: E731


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: Job) -> None:
    try:
        _do(job)
    except StayalignedError:
        raise
    except Exception as error:
        # Many exceptions can't cross a process border, and one that can't would take the whole pool with it.
        path = job.out / "failures" / f"{job.name.replace(' ', '-')}.txt"
        write_text(path, traceback.format_exc())
        raise StayalignedError(f"{type(error).__name__}: {error}", hint=f"The whole traceback: {path}") from None


def _do(job: Job) -> None:
    run = Run(
        job.experiment,
        Store(job.out),
        progress=lambda text, share: _report(f"{job.title} · {text}", share),
        threads=_threads,
        position=job.position,
    )
    if job.kind == "testbed":
        _ = run.resolved
    elif job.kind == "train":
        run.trained()
    else:
        run.write_into(run_directory(job.out, run))
