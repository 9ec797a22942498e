"""What every stage of a run receives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property

from stayaligned.core.progress import Progress, silent
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import resolve_references
from stayaligned.experiments.plan import Plan, plan_experiment
from stayaligned.experiments.stages.store import Store


@dataclass(frozen=True)
class Context:
    """An experiment, the keys of its stages, the store that holds them, and how to report."""

    experiment: Experiment
    store: Store
    progress: Progress = silent
    announce: Callable[[str], None] = lambda _text: None
    """Called with a message that the user should see before something expensive starts."""
    threads: int | None = None
    """CPU threads for torch; all if None."""

    @cached_property
    def plan(self) -> Plan:
        """The keys of the stages."""
        return plan_experiment(self.experiment)

    @cached_property
    def resolved(self) -> Experiment:
        """The experiment with each `testbed:` reference replaced by a path; builds the testbed if it is missing."""
        return resolve_references(self.experiment, self.experiment.seed, self.progress)

    @contextlib.contextmanager
    def host_libraries(self) -> Generator[None]:
        """Limit torch to this run's threads, and silence the host libraries."""
        import torch

        from stayaligned.hf.quiet import quiet

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with quiet():
            yield
