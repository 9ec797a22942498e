"""Run one experiment into one directory, in one process or in several."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.processes import is_distributed, is_leader
from stayaligned.core.progress import Progress, silent
from stayaligned.evaluation.results import Result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.packages import require_installed
from stayaligned.experiments.config.yaml_file import dump_yaml, load_yaml
from stayaligned.experiments.pipeline import run_stages
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_training_rows
from stayaligned.experiments.stages.patch import make_weights
from stayaligned.experiments.stages.store import Store, collect_warnings
from stayaligned.experiments.stages.train import train_into

EXPERIMENT_FILE = "experiment.yaml"


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _text: None,
) -> Result | None:
    """Run an experiment into `out`: `experiment.yaml`, `result.json`, the stages, and `adapter` or `model` if any.

    Rerun with the same experiment, it resumes where it stopped. Started in several processes (by `torchrun` or
    `accelerate launch`), all processes train, and the first process does everything else.

    Args:
        experiment: the experiment.
        out: the output directory; new, empty, or written by an earlier run of the same experiment.
        progress: called with what is being done and the share that is done.
        announce: called with a judge's forecast of its cost, before the judge starts, and if nothing was computed.

    Returns:
        The result; None in a process that only helped to train.

    Raises:
        StayalignedError: if `out` holds other files or belongs to another experiment or version, if a package that
            the experiment needs is not installed, or if a stage fails.
    """
    require_installed([experiment])
    store = Store(out)
    if is_distributed() and not is_leader():
        _help_to_train(Context(experiment, store))
        return None
    context = Context(experiment, store, progress, announce)
    store.refuse_foreign(EXPERIMENT_FILE)
    _refuse_other_experiment(experiment, out / EXPERIMENT_FILE)
    with store.locked():
        write_text(out / EXPERIMENT_FILE, dump_yaml(experiment.spec()))
        if is_distributed():
            from stayaligned.hf.training.processes import broadcast

            load_training_rows(context)
            broadcast(experiment.trains and not store.directory("train", context.plan.train).exists())
        result = run_stages(context, out)
        for product in ("adapter", "model"):
            _link(out / product, make_weights(context) if context.plan.product == product else None)
        if not store.computed:
            announce(f"nothing was computed: every stage of this run is stored in {out}")
    return result


def _help_to_train(context: Context) -> None:
    """Train with the first process once it has written the data, if there is anything to train; store nothing."""
    from stayaligned.hf.training.processes import broadcast

    if broadcast():
        with collect_warnings(), tempfile.TemporaryDirectory() as unused:  # the first process has the same ones
            train_into(context, Path(unused))


def _link(link: Path, target: Path | None) -> None:
    """Point `link` at a stage's output, by a relative path, so that the directory can be moved; None removes it."""
    if target is None or not target.is_relative_to(link.parent):
        link.unlink(missing_ok=True)
        return
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    temporary.replace(link)


def _refuse_other_experiment(experiment: Experiment, path: Path) -> None:
    """Refuse a directory with another experiment's stages; one that holds at most training rows may be reused."""
    stages = [p.name for p in (path.parent / "stages").glob("[!.]*") if not p.name.startswith("data-")]
    if not path.exists() or not stages:
        return
    before, now = load_yaml(path), experiment.spec()
    changed = sorted(k for k in {*before, *now} - {"label"} if before.get(k) != now.get(k))
    if changed:
        raise StayalignedError(
            f"{path.parent}: belongs to another experiment; different: {', '.join(changed)}",
            hint="Use another --out; `bench` compares several experiments in one directory and shares their stages.",
        )
