"""The optional packages that experiments need, which are checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stayaligned import testbed
from stayaligned.core.component import Component
from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.core.settings import TrainerKind
from stayaligned.evaluation.judges import Judge
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import strings_in

_REPORT = {"the report": EXTRAS["report"]}


def require_installed(experiments: Sequence[Experiment], *, report: bool = False) -> None:
    """Check that the packages which experiments import at some point are installed.

    Args:
        experiments: the experiments.
        report: whether a report of their results follows.

    Raises:
        StayalignedError: naming every package that is missing, and the command that installs all of them.
    """
    needed = dict(need for experiment in experiments for need in _needs(experiment))
    require_packages(needed | (_REPORT if report else {}))


def require_for_training(kind: TrainerKind) -> None:
    """Check that the packages which a trainer of a kind needs are installed.

    Raises:
        StayalignedError: as `require_installed`.
    """
    require_packages({"the model": EXTRAS["models"], **({"trainer: sft": EXTRAS["trl"]} if kind == "sft" else {})})


def require_for_judging(judges: Sequence[Judge]) -> None:
    """Check that the packages which judges and the report of their verdicts need are installed.

    Raises:
        StayalignedError: as `require_installed`.
    """
    require_packages(dict(map(_need, judges)) | _REPORT)


def _needs(e: Experiment) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what imports optional packages, with these packages."""
    served = e.generation.backend == "endpoint"
    perplexity = e.degeneration is not None and e.degeneration.perplexity is not None
    named = [value for _, value in strings_in(e.spec())]
    built = any(map(testbed.is_reference, named))
    if not served or perplexity or built:
        yield "the model", EXTRAS["models"]
    yield from ((value, ["datasets"]) for value in named if value.startswith("hf://"))
    if served:
        yield "generation.backend: endpoint", EXTRAS["endpoint"]
    if e.trains and e.trainer == "sft":
        yield "trainer: sft", EXTRAS["trl"]
    if e.lm_eval is not None:
        yield "lm_eval", ["lm_eval"]
    parts = (e.task, e.skills, e.attack, e.harmful_prompts, e.benign_prompts, *e.defenses, *e.judges)
    yield from (_need(part) for part in parts if isinstance(part, Component))


def _need(component: Component) -> tuple[str, Sequence[str]]:
    return component.name, component.packages()
