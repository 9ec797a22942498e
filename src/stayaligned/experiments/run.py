"""One experiment into one directory, in one process or in several."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.progress import Progress, silent
from stayaligned.evaluation.results import Result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.yaml_file import load_yaml
from stayaligned.experiments.pipeline import EXPERIMENT_FILE, Run
from stayaligned.experiments.stages.store import Store, refuse_foreign
from stayaligned.hf.training import processes


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _text: None,
) -> Result | None:
    """Run one experiment into `out`: `experiment.yaml`, `result.json`, its stages, and `adapter` if it has one.

    Rerun with the same experiment, it continues where it was stopped. Started in several processes (by `torchrun` or
    `accelerate launch`), all train, and the first does everything else.

    Returns:
        The result; None in a process that has only helped to train.

    Raises:
        StayalignedError: if `out` belongs to another experiment or holds other files, or any stage cannot work.
    """
    store = Store(out)
    run = Run(experiment, store, progress, announce=announce)
    if processes.is_distributed() and not processes.is_leader():
        _help_to_train(run)
        return None
    refuse_foreign(out, EXPERIMENT_FILE)
    _refuse_other_experiment(experiment, out / EXPERIMENT_FILE)
    with store.locked():
        write_text(out / EXPERIMENT_FILE, yaml.safe_dump(experiment.spec(), sort_keys=False, allow_unicode=True))
        if processes.is_distributed():
            run.examples()
            processes.broadcast(experiment.trains and not store.directory("train", run.adapter_key).exists())
        result = run.write_into(out)
        for product in ("adapter", "model"):
            _link(out / product, run.finetuned() if run.product == product else None)
    return result


def _help_to_train(run: Run) -> None:
    """Train with the leader, once it has the data and says that there is training to do; keep nothing."""
    if processes.broadcast():
        with tempfile.TemporaryDirectory() as unused:
            run.train_into(Path(unused))


def _link(link: Path, target: Path | None) -> None:
    """Let `link` lead to a stage's output, relatively, so that the directory can be moved; None removes it."""
    if target is None or not target.is_relative_to(link.parent):
        link.unlink(missing_ok=True)
        return
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    temporary.replace(link)


def _refuse_other_experiment(experiment: Experiment, path: Path) -> None:
    """Refuse a directory with another experiment's work; one that failed before any weights were made is free."""
    stages = [p.name for p in (path.parent / "stages").glob("[!.]*") if not p.name.startswith("data-")]
    if not path.exists() or not stages:
        return
    before, now = load_yaml(path), experiment.spec()
    changed = sorted(k for k in {*before, *now} - {"label"} if before.get(k) != now.get(k))
    if changed:
        raise StayalignedError(
            f"{path.parent}: belongs to another experiment; different: {', '.join(changed)}",
            hint="Use another --out; `bench` compares several in one directory and shares their stages.",
        )
