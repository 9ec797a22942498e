"""lm-eval's tasks as stages of a run, one each: a new task costs no old one, and a killed run loses one at most."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.records import HarnessValue, read_jsonl, write_jsonl
from stayaligned.core.settings import LmEval
from stayaligned.experiments.stages.store import Store


@dataclass(frozen=True)
class HarnessStages:
    """The stages of one run's tasks; none if it names none."""

    store: Store
    settings: LmEval | None
    """With every path resolved."""
    keys: Mapping[str, str]
    """What the values of each task depend on, by its name."""
    seed: int
    libraries: Callable[[], AbstractContextManager[None]]
    """Within it, the host libraries work."""
    progress: Callable[[str, float], None]

    def directories(self) -> dict[str, Path]:
        """Where each task's stage is, or will be, by `lm_eval NAME`."""
        return {f"lm_eval {name}": self.store.directory("lm_eval", key) for name, key in self.keys.items()}

    def load_tasks(self) -> None:
        """Fail now, and not after hours of training, where a task that is still to be run can't be had.

        Raises:
            StayalignedError: as `hf.harness.load_tasks`.
        """
        missing = [name for name, key in self.keys.items() if not self.store.directory("lm_eval", key).exists()]
        if self.settings is None or not missing:
            return
        from stayaligned.hf import lm_eval

        with self.libraries():
            for name in missing:
                self.progress(f"lm-eval loads {name}", 0.0)
                lm_eval.load_tasks(self.settings, name)

    def values(self, load: Callable[[], tuple[Any, Any]]) -> list[HarnessValue]:
        """Every task's values; `load` gives model and tokenizer, and is called once if any stage is not there."""
        if self.settings is None:
            return []
        loaded = functools.cache(load)
        rows: list[HarnessValue] = []
        for name, key in self.keys.items():
            fill = functools.partial(self._fill, settings=self.settings, name=name, load=loaded)
            rows += read_jsonl(self.store.compute("lm_eval", key, fill) / "lm_eval.jsonl", HarnessValue)
        return rows

    def left_out(self) -> Iterable[str]:
        """A sentence on each metric that is no mean of shares, of the stages that are there."""
        for stage, directory in self.directories().items():
            record = json.loads((directory / "stage.json").read_text(encoding="utf-8"))
            for task, metrics in record["left_out"].items():
                for metric, why in metrics.items():
                    yield f"{stage}: {metric} of {task} is left out: {why}"

    def _fill(
        self, directory: Path, settings: LmEval, name: str, load: Callable[[], tuple[Any, Any]]
    ) -> Mapping[str, Any]:
        from stayaligned.hf import lm_eval
        from stayaligned.hf.training import finetuning

        say = functools.partial(self.progress, f"lm-eval {name}")
        say(0.0)
        with self.libraries():
            model, tokenizer = load()
            finetuning.seed_everything(self.seed)
            values, left_out = lm_eval.run_task(model, tokenizer, settings, name, progress=say)
        write_jsonl(directory / "lm_eval.jsonl", values)
        return {"left_out": left_out}
