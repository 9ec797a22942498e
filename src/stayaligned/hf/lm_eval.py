"""Tasks of lm-eval on a model in memory: loaded before anything expensive starts, then run.

`lm_eval.evaluator.evaluate` does the work. `simple_evaluate` would also seed the whole process and query pip and git
for the environment; its other settings (number of few-shot examples, few-shot seed) are repeated here.
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
from stayaligned.core.extras import require_packages
from stayaligned.core.records import HarnessValue
from stayaligned.core.settings import LmEval
from stayaligned.core.thoughts import closes_thoughts, opened_thoughts, split_thoughts
from stayaligned.hf.features import with_known_padding
from stayaligned.hf.generation.generate import decode

_log = logging.getLogger(__name__)
_FEWSHOT_SEED = 1234
"""lm-eval's own default."""
_PARTS = 20
"""Number of parts into which a task's requests are divided for progress; each has at least `_LEAST` requests."""
_LEAST = 256


def load_tasks(settings: LmEval, name: str) -> dict[str, Any]:
    """Load the tasks of a name (a group or a tag has several) with their data; return them by their own names.

    Raises:
        StayalignedError: if lm-eval is not installed, the task is unknown, its data can't be loaded, or it runs code
            that the model writes.
    """
    require_packages({f"lm_eval: {name}": ["lm_eval"]})
    from lm_eval.tasks import TaskManager

    folder = None if settings.include_path is None else Path(settings.include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise StayalignedError(
            f"lm_eval.include_path: {folder} is not a directory", hint="Give the directory of the YAML files."
        )
    with _quiet():
        try:
            manager = TaskManager(include_path=folder, include_defaults=False)
            if name not in manager.all_tasks:
                # The index of its 15 000 tasks takes seconds: only if the name is not one of the user's tasks.
                manager = TaskManager(include_path=folder, include_defaults=True)
            if name not in manager.all_tasks:
                hint = "`lm_eval ls tasks` lists its tasks; set `include_path` for your own."
                raise StayalignedError(
                    f"lm_eval.tasks: unknown task {name!r}",
                    hint=f"{nearest(name, manager.all_tasks)} {hint}".lstrip(),
                )
            loaded: dict[str, Any] = manager.load([name])["tasks"]
        except StayalignedError:
            raise
        except Exception as error:  # a task is arbitrary YAML and Python, and may fail in any way
            raise StayalignedError(
                f"lm_eval: can't load the task {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                hint="Check its YAML, the files it names (from the current directory), the network and your access; "
                "offline, its data must be local or in the cache.",
            ) from None
    unsafe = [own for own, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise StayalignedError(
            f"lm_eval: {', '.join(unsafe)} runs code that the model writes, which stayaligned does not support",
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
    """Return the values of every sample, and by task and metric the reasons why other metrics are skipped.

    Only metrics between 0 and 1 whose mean lm-eval itself computes are used: the mean of the samples' values is not
    what perplexity or BLEU means.

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
    unanswered: list[bool] = []
    with _quiet():
        results: Any = evaluate(
            lm=_model(model, tokenizer, settings.batch_size, progress, unanswered),
            task_dict={"tasks": loaded, "groups": {}, "group_map": {}},
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )
    if any(unanswered):
        _log.warning(
            "lm_eval %s: %d of %d completions are thoughts without a final answer; lm-eval scores their text as it is",
            *(name, sum(unanswered), len(unanswered)),
        )
    values: list[HarnessValue] = []
    skipped: dict[str, dict[str, str]] = {}
    for own, task in loaded.items():
        kept, refused = _values(own, task, results["samples"][own])
        values += kept
        if refused:
            skipped[own] = refused
    return values, skipped


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
                refused[full] = "lm-eval does not compute the mean over its samples"
            elif better is None:
                refused[full] = "lm-eval does not define whether higher is better"
            elif not math.isnan(value) and not 0 <= value <= 1:
                refused[full] = "its values are not between 0 and 1"
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


def _model(
    model: Any, tokenizer: Any, batch_size: int, progress: Callable[[float], None], unanswered: list[bool]
) -> Any:
    """Return the model in lm-eval's interface; it calls `progress` instead of showing progress bars.

    `unanswered` gets, for each generated text, whether it is thoughts without a final answer.
    """
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._in_parts(super().generate_until, requests)

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            host: Any = super()
            rows = host._model_generate(context, *args, **options)
            for row in rows.tolist():
                asked, wrote = (decode(tokenizer, part) for part in (row[: context.shape[1]], row[context.shape[1] :]))
                unanswered.append(split_thoughts(opened_thoughts(asked) + wrote).answer is None)
            return rows

        def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            size = max(_LEAST, math.ceil(len(requests) / _PARTS))
            answers: list[Any] = []
            for start in range(0, len(requests), size):
                answers += answer(requests[start : start + size], disable_tqdm=True)
                progress(len(answers) / len(requests))
            return answers

    make: Any = Quiet  # its constructor is typed by a decorator that hides the arguments
    closing = (index for index, token in tokenizer.added_tokens_decoder.items() if closes_thoughts(str(token)))
    # lm-eval removes what a completion has before this token, so that thoughts are not scored.
    tokenizer = with_known_padding(tokenizer, model)
    return make(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, think_end_token=next(closing, None))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Within the block, let lm-eval log errors only, and show no progress bar while it builds prompts."""
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
