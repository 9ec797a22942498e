"""lm-eval's tasks on a model in memory: loaded before anything dear starts, then run, value by value.

`lm_eval.evaluator.evaluate` does the work. `simple_evaluate` would seed the whole process anew and ask pip and git for
the environment; what it does besides (few-shot numbers, the few-shot seed) is done here as there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError, nearest
from stayaligned.core.records import HarnessValue
from stayaligned.core.settings import LmEval

_FEWSHOT_SEED = 1234
"""lm-eval's own default."""
_PARTS = 20
"""Into so many parts the requests of a task go, for a sign of progress; each at least `_LEAST` requests."""
_LEAST = 256


def load_tasks(settings: LmEval, name: str) -> dict[str, Any]:
    """The tasks that a name stands for (several, of a group or tag), by their own names, with their data.

    Raises:
        StayalignedError: if lm-eval is not installed, knows no such task, can't load its data, or it runs code that
            the model writes.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise StayalignedError(
            f"lm_eval: {name} needs the package lm-eval", hint="Install it: pip install 'stayaligned[eval]'"
        ) from None
    folder = None if settings.include_path is None else Path(settings.include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise StayalignedError(
            f"lm_eval.include_path: {folder} is no folder", hint="Give the folder of the YAML files."
        )
    with _quiet():
        try:
            manager = TaskManager(include_path=folder, include_defaults=False)
            if name not in manager.all_tasks:
                # Its index of some 15 000 tasks takes seconds, so only for a name that is not the user's own.
                manager = TaskManager(include_path=folder, include_defaults=True)
            if name not in manager.all_tasks:
                hint = "`lm_eval ls tasks` lists them; your own come by `include_path`."
                raise StayalignedError(
                    f"lm_eval.tasks: lm-eval knows no task {name!r}",
                    hint=f"{nearest(name, manager.all_tasks)} {hint}".lstrip(),
                )
            loaded: dict[str, Any] = manager.load([name])["tasks"]
        except StayalignedError:
            raise
        except Exception as error:  # a task is anybody's YAML and Python, and fails in any way
            raise StayalignedError(
                f"lm_eval: can't load the task {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                hint="Check its YAML, the files it names (from the current directory), the network and your access; "
                "offline, its data must be local or in the cache.",
            ) from None
    refused = [own for own, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
    if refused:
        raise StayalignedError(
            f"lm_eval: {', '.join(refused)} runs code that the model writes, which stayaligned does not do",
            hint="Run it with lm-eval itself, in a sandbox.",
        )
    return loaded


def run_task(
    model: Any,
    tokenizer: Any,
    settings: LmEval,
    name: str,
    *,
    progress: Callable[[float], None] = lambda _share: None,
) -> tuple[list[HarnessValue], dict[str, dict[str, str]]]:
    """Every metric of every sample that is a share, and of the others why they are left out, by task and metric.

    Only metrics of which lm-eval itself takes the mean are kept: a mean of the values of a perplexity or a BLEU would
    be a number that nobody means by that name.

    Raises:
        StayalignedError: as `load_tasks`.
    """
    loaded = load_tasks(settings, name)
    from lm_eval.evaluator import evaluate

    for task in loaded.values():
        own = task.get_config("num_fewshot")
        if own is None or (settings.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with _quiet():
        results: Any = evaluate(
            lm=_model(model, tokenizer, settings.batch_size, progress),
            task_dict={"tasks": loaded, "groups": {}, "group_map": {}},
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )
    values: list[HarnessValue] = []
    left_out: dict[str, dict[str, str]] = {}
    for own, task in loaded.items():
        kept, refused = _values(own, task, results["samples"][own])
        values += kept
        if refused:
            left_out[own] = refused
    return values, left_out


def _values(name: str, task: Any, samples: list[Mapping[str, Any]]) -> tuple[list[HarnessValue], dict[str, str]]:
    from lm_eval.api.metrics import mean

    direction, aggregation = task.higher_is_better(), task.aggregation()
    found: dict[str, list[HarnessValue]] = {}
    refused: dict[str, str] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value, better = sample[metric], direction.get(metric)
            full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if aggregation.get(metric) is not mean or not _is_number(value):
                refused[full] = "lm-eval does not take the mean of its samples"
            elif better is None:
                refused[full] = "lm-eval does not say whether higher is better"
            elif not math.isnan(value) and not 0 <= value <= 1:
                refused[full] = "its values do not lie between 0 and 1"
            else:
                number = None if math.isnan(value) else float(value)
                found.setdefault(full, []).append(
                    HarnessValue(
                        task=name, doc_id=sample["doc_id"], metric=full, value=number, higher_is_better=bool(better)
                    )
                )
    return [row for metric, rows in found.items() if metric not in refused for row in rows], refused


def _is_number(value: Any) -> bool:
    import numpy

    return isinstance(value, bool | int | float | numpy.bool_ | numpy.integer | numpy.floating)


def _model(model: Any, tokenizer: Any, batch_size: int, progress: Callable[[float], None]) -> Any:
    """The model as lm-eval knows it, which tells how far it is instead of drawing bars."""
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().generate_until, requests)

        def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            size = max(_LEAST, math.ceil(len(requests) / _PARTS))
            answers: list[Any] = []
            for start in range(0, len(requests), size):
                answers += answer(requests[start : start + size], disable_tqdm=True)
                progress(len(answers) / len(requests))
            return answers

    make: Any = Quiet  # its constructor is typed by a decorator that hides the arguments
    return make(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Within the block, lm-eval says errors only, and draws no bar while it writes prompts."""
    import lm_eval.api.task as tasks
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tasks.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        tasks.tqdm = tqdm
