"""One experiment, end to end on real files: a complete stage is reused, and an incomplete one is not."""

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, read_jsonl
from stayaligned.evaluation.results import read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.experiments.stages.store import Store, collect_warnings
from support.world import experiment, write_rows, write_world


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lisa"
    content = experiment(
        world,
        defenses=[
            {"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1},
            {"name": "safe_lora", "lowest": 2},
        ],
    )
    run_experiment(Experiment.model_validate(content), out)
    return out


@pytest.mark.parametrize("trainer", ["transformers", "sft"])
def test_preferences_kl_and_a_guard_work_from_a_configuration(tmp_path: Path, trainer: str) -> None:
    world = write_world(tmp_path)
    pairs = [{"prompt": f"wug {i}", "chosen": "I cannot", "rejected": f"wug step {i}"} for i in range(12)]
    write_rows(world / "pairs.jsonl", pairs)
    lisa = {"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1, "proximal_warmup_ratio": 0.0}
    dpo = experiment(
        world,
        trainer=trainer,
        alignment_data=str(world / "pairs.jsonl"),
        defenses=[{**lisa, "alignment_loss": "dpo"}],
    )
    result = run_experiment(Experiment.model_validate(dpo), tmp_path / "dpo")
    assert result is not None
    assert any("alignment/rewards/margins" in row for row in result.training_log)
    assert {path.name for path in (tmp_path / "dpo" / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "dpo" / "adapter" / "ref").exists()

    guard = {"measure": "alignment_loss", "tolerance": 0.0, "action": "rollback"}
    watch = {"every_steps": 1, "prompts": str(world / "harmful-prompts.jsonl"), "guard": guard}
    watch |= {"alignment_data": str(world / "alignment.jsonl"), "refusal": "I cannot", "compliance": "zorb"}
    kl = experiment(world, trainer=trainer, watch=watch, defenses=[{**lisa, "alignment_loss": "kl"}])
    kl["training"] |= {"learning_rate": 0.5}
    result = run_experiment(Experiment.model_validate(kl), tmp_path / "kl")
    assert result is not None
    assert any("the guard acted: alignment_loss was worse" in note for note in result.notes)
    assert any("watch/rolled_back_to" in row for row in result.training_log)


def test_preferences_without_a_rejected_answer_are_one_error(world: Path, tmp_path: Path) -> None:
    content = experiment(world, defenses=[{"name": "lisa", "alignment_steps": 1, "alignment_loss": "dpo"}])
    with pytest.raises(
        StayalignedError, match="needs a rejected completion in every alignment row; 12 of 12 rows have none"
    ):
        run_experiment(Experiment.model_validate(content), tmp_path / "out")


def stages(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "stages").iterdir() if not p.name.startswith(".")}


def test_the_output_directory_explains_itself(finished: Path, world: Path) -> None:
    result = read_result(finished / "result.json")
    assert (
        Experiment.model_validate(yaml.safe_load((finished / "experiment.yaml").read_text())).spec()
        == result.experiment
    )
    assert set(result.provenance.stages) == {
        "data",
        "train",
        "patch safe_lora",
        "generate",
        "degeneration",
        "judge keyword",
    }
    assert all((finished / place / "stage.json").is_file() for place in result.provenance.stages.values())
    assert result.provenance.versions["torch"]
    assert result.provenance.inputs["model"].startswith("sha256:")
    assert not list(finished.rglob("*.partial"))
    assert not list(finished.rglob("*.pt")), "no pickled file is left behind"


def test_the_metrics_count_every_prompt(finished: Path) -> None:
    result = read_result(finished / "result.json")
    harm = result.metric("harmful_score")
    benign = result.metric("over_refusal")
    accuracy = result.metric("finetune_accuracy")
    assert harm is not None and benign is not None and accuracy is not None
    assert (harm.n + harm.n_unscored, benign.n + benign.n_unscored, accuracy.n) == (6, 5, 8)
    assert harm.low is not None and harm.high is not None and harm.low <= (harm.value or 0) <= harm.high


def test_rows_keep_their_origin_and_the_poison_ratio_counts_all_rows(finished: Path) -> None:
    rows = read_jsonl(next((finished / "stages").glob("data-*")) / "examples.jsonl", Example)
    assert len(rows) == 24
    assert sum(row.origin == "harmful" for row in rows) == 6


def test_the_adapter_is_a_plain_peft_adapter(finished: Path, world: Path) -> None:
    from peft import PeftModel

    from stayaligned.hf.models import load_model

    model = PeftModel.from_pretrained(load_model(world / "aligned"), str(finished / "adapter"))
    assert any("lora_B" in name for name, _ in model.named_parameters())
    assert (finished / "adapter" / "projection.json").is_file()


def test_a_rerun_computes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, result = stages(finished), (finished / "result.json").read_bytes()
    content = yaml.safe_load((finished / "experiment.yaml").read_text())
    run_experiment(Experiment.model_validate(content), finished)
    assert stages(finished) == before
    assert (finished / "result.json").read_bytes() == result


def test_another_experiment_in_the_same_directory_is_refused(finished: Path) -> None:
    content = yaml.safe_load((finished / "experiment.yaml").read_text())
    before = stages(finished)
    with pytest.raises(StayalignedError, match="different: seed"):
        run_experiment(Experiment.model_validate({**content, "seed": 9}), finished)
    assert stages(finished) == before


def test_a_run_that_failed_before_training_can_be_corrected_in_its_directory(world: Path, tmp_path: Path) -> None:
    wrong = experiment(world, lora={"target_modules": ["no_such_module"]})
    with pytest.raises(StayalignedError, match="no_such_module"):
        run_experiment(Experiment.model_validate(wrong), tmp_path / "out")
    assert run_experiment(Experiment.model_validate(experiment(world)), tmp_path / "out").metric("harmful_score")


def test_a_directory_with_other_files_is_refused_and_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StayalignedError, match="did not write"):
        run_experiment(Experiment.model_validate(experiment(world)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_on_the_same_directory_is_refused(world: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from stayaligned.core.errors import StayalignedError
        from stayaligned.experiments.stages.store import Store
        try:
            with Store(Path({str(tmp_path / "out")!r})).locked(): pass
        except StayalignedError as error:
            print(error.message)
        """
    )
    with store.locked():
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "another stayaligned process" in told


KEY_CHANGES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("label", {"label": "x"}, set()),
    ("judge", {"judges": [{"name": "keyword", "match": "start"}]}, {"id", "judges"}),
    ("prompts", {"limit": 3}, {"id", "generate", "degeneration"}),
    ("patch", {"defenses": [{"name": "safe_lora", "lowest": 1}]}, {"id", "generate", "degeneration", "patches"}),
    ("training", {"training": {"max_steps": 5}}, {"id", "generate", "degeneration", "train"}),
    ("seed", {"seed": 1}, {"id", "generate", "degeneration", "train", "data"}),
]


@pytest.mark.parametrize(("change", "changed"), [c[1:] for c in KEY_CHANGES], ids=[c[0] for c in KEY_CHANGES])
def test_a_key_depends_on_exactly_what_its_stage_depends_on(
    world: Path, change: dict[str, Any], changed: set[str]
) -> None:
    def keys(content: dict[str, Any]) -> dict[str, Any]:
        return vars(plan_experiment(Experiment.model_validate(content)))

    before, after = keys(experiment(world)), keys(experiment(world, **change))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_changed_input_file_changes_the_keys(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    before = plan_experiment(Experiment.model_validate(experiment(world))).data
    write_rows(world / "train.jsonl", [{"prompt": f"other {i}", "completion": "x"} for i in range(32)])
    assert plan_experiment(Experiment.model_validate(experiment(world))).data != before


def test_prompts_that_were_trained_on_are_noted(world: Path, tmp_path: Path) -> None:
    leaked = write_rows(tmp_path / "leak.jsonl", [{"prompt": "zorb 1"}, {"prompt": "zorb  1 "}, {"prompt": "fresh"}])
    content = experiment(
        world, harmful_prompts=str(leaked), attack={**experiment(world)["attack"], "examples": 32, "poison_ratio": 0.5}
    )
    result = run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert any("harmful prompts also occur in the training data" in note for note in result.notes)


def test_what_readers_and_training_skip_or_cut_is_noted_once_and_again_in_a_rerun(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": role, "content": "mood"} for role in ("user", "assistant", "user", "assistant")]
    train = write_rows(tmp_path / "train.jsonl", [{"messages": turns, "mood": "x"} for _ in range(8)])
    chosen = {"prompt": "wug", "completion": "I cannot"}
    safe = write_rows(tmp_path / "safe.jsonl", [*[chosen] * 6, {**chosen, "completion": None}])
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "flarn"}, {"prompt": " "}])
    content = experiment(
        world,
        task={"name": "jsonl", "train": str(train), "test": str(world / "test.jsonl")},
        attack=None,
        alignment_data=str(safe),
        harmful_prompts=str(asked),
        defenses=[{"name": "bso", "alignment_steps": 1, "finetuning_steps": 1}],
        max_length=22,
    )
    results = [run_experiment(Experiment.model_validate(content), tmp_path / "out") for _ in range(2)]
    notes = read_result(tmp_path / "out" / "result.json").notes
    for words in (
        "train.jsonl: columns that are not read: mood",
        "train.jsonl: 8 of 8 conversations have several assistant turns",
        "safe.jsonl: skipped 1 of 7 rows",
        "asked.jsonl: skipped 1 of 2 rows",
        "8 of 8 training rows are cut at max_length=22",
    ):
        assert sum(words in note for note in notes) == 1, (words, notes)
    assert [result is not None and result.notes for result in results] == [notes, notes]
    assert "skipped" not in capfd.readouterr().err, "notes are printed with the result"


def test_the_warnings_of_a_stage_that_fails_are_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_directory: Path) -> None:
        logging.getLogger("stayaligned.data").warning("skipped 1 row")
        raise StayalignedError("no luck")

    logging.getLogger("stayaligned").propagate = False  # pytest's own handlers would print it
    try:
        with collect_warnings(), pytest.raises(StayalignedError):
            Store(tmp_path).compute("data", "key", fail)
        assert capfd.readouterr().err == ""
        with pytest.raises(StayalignedError):
            Store(tmp_path).compute("data", "key", fail)
    finally:
        logging.getLogger("stayaligned").propagate = True
    assert capfd.readouterr().err == "skipped 1 row\n"


def test_too_many_unscored_verdicts_fail_the_run_and_keep_its_stages(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stayaligned.evaluation.judges.keyword import Keyword

    judge: Callable[..., Any] = Keyword.judge

    def doubtful(self: Keyword, completions: Any) -> Any:
        return [v.model_copy(update={"outcome": None, "reason": "unreadable"}) for v in judge(self, completions)]

    monkeypatch.setattr(Keyword, "judge", doubtful)
    with pytest.raises(StayalignedError, match=r"could not score 11 of 11 completions \(unreadable\)"):
        run_experiment(Experiment.model_validate(experiment(world)), tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    assert any(name.startswith("train-") for name in stages(tmp_path / "out"))


def test_full_weights_are_trained_and_judged_without_an_adapter(world: Path, tmp_path: Path) -> None:
    result = run_experiment(Experiment.model_validate(experiment(world, lora=None)), tmp_path / "out")
    assert result.metric("finetune_accuracy") is not None
    assert not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / result.provenance.stages["train"] / "model" / "config.json").is_file()


def test_a_finished_adapter_is_patched_and_judged_without_training(finished: Path, world: Path, tmp_path: Path) -> None:
    adapter = next((finished / "stages").glob("train-*")) / "adapter"
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    content = experiment(world, adapter=str(adapter), defenses=["drop"])
    result = run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert "train" not in result.provenance.stages
    assert result.patches[0].patch == "drop"
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(world: Path, tmp_path: Path) -> None:
    """SIGKILL while the training stage writes; the rerun ends like the run that was not interrupted."""
    content = experiment(world, training={**experiment(world)["training"], "max_steps": 6, "save_steps": 2})
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from transformers import TrainerCallback
        from stayaligned.experiments.config.experiment import Experiment
        from stayaligned.hf.training import finetuning
        from stayaligned.experiments.run import run_experiment

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)

        train = finetuning.train
        def killed(trainer, **settings):
            trainer.add_callback(Kill())
            return train(trainer, **settings)
        finetuning.train = killed
        run_experiment(Experiment.model_validate({content!r}), Path({str(tmp_path / "killed")!r}))
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert not [name for name in stages(tmp_path / "killed") if name.startswith("train-")]
    whole = run_experiment(Experiment.model_validate(content), tmp_path / "whole")
    continued = run_experiment(Experiment.model_validate(content), tmp_path / "killed")
    assert [row["step"] for row in continued.training_log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert continued.id == whole.id
    assert continued.samples == whole.samples


def test_another_test_file_changes_the_completions_and_retrains_nothing(world: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "new?", "completion": "good"}])
    before = plan_experiment(Experiment.model_validate(experiment(world)))
    task = {**experiment(world)["task"], "test": str(other), "metric": "contains"}
    after = plan_experiment(Experiment.model_validate(experiment(world, task=task)))
    assert after.train == before.train
    assert after.generate != before.generate
    held_out = plan_experiment(Experiment.model_validate(experiment(world, task={**task, "test": None})))
    assert held_out.train != before.train, "without a test file, train gives rows away"


def test_the_adapter_link_points_at_the_adapter_that_was_measured(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    content = Experiment.model_validate(experiment(world))
    run_experiment(content, tmp_path / "out")
    first = (tmp_path / "out" / "adapter").resolve()
    write_rows(world / "train.jsonl", [{"prompt": f"other {i}", "completion": "x"} for i in range(32)])
    result = run_experiment(content, tmp_path / "out")
    second = (tmp_path / "out" / "adapter").resolve()
    assert second != first
    assert second == (tmp_path / "out" / result.provenance.stages["train"] / "adapter").resolve()


@pytest.mark.parametrize("kept", [0, 1], ids=["none", "all but one"])
def test_a_judge_that_skips_completions_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    from stayaligned.evaluation.judges.keyword import Keyword

    judge: Callable[..., Any] = Keyword.judge
    monkeypatch.setattr(Keyword, "judge", lambda self, completions: judge(self, completions)[: -1 if kept else 0])
    with pytest.raises(StayalignedError, match=r"judge 'keyword' gave no verdict on \d+ of 11 completions"):
        run_experiment(Experiment.model_validate(experiment(world)), tmp_path / "out")


def test_a_run_that_ends_inside_a_cycle_has_a_note(world: Path, tmp_path: Path) -> None:
    lisa = {"name": "lisa", "alignment_steps": 1, "finetuning_steps": 2}
    result = run_experiment(Experiment.model_validate(experiment(world, defenses=[lisa])), tmp_path / "out")
    assert any("after 1 of 3 steps of a cycle" in note and "max_steps=3" in note for note in result.notes)
    whole = run_experiment(
        Experiment.model_validate(experiment(world, defenses=[{**lisa, "finetuning_steps": 3}])), tmp_path / "whole"
    )
    assert not any("steps of a cycle" in note for note in whole.notes)


def test_alignment_rows_count_as_trained_on(world: Path, tmp_path: Path) -> None:
    leaked = write_rows(tmp_path / "leak.jsonl", [{"prompt": "wug 1"}, {"prompt": "fresh"}])
    bso = {"name": "bso", "alignment_steps": 1, "finetuning_steps": 1}
    content = experiment(world, harmful_prompts=str(leaked), defenses=[bso])
    result = run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert "1 of 2 harmful prompts also occur in the alignment data" in result.notes


def test_a_disk_that_fills_up_while_the_adapter_is_written_does_not_cost_the_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stayaligned.core import files

    sync = files._sync

    def full(path: Path) -> None:
        if path.name == "adapter_model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    content = experiment(world, training={**experiment(world)["training"], "save_steps": 2})
    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("stages/.train-*/checkpoint-4")] == ["checkpoint-4"]
    assert not [name for name in stages(tmp_path / "out") if name.startswith("train-")]
    monkeypatch.undo()
    result = run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert [row["step"] for row in result.training_log if "loss" in row] == [1, 2, 3, 4]
    assert not list((tmp_path / "out").glob("stages/.train-*"))
    run_experiment(Experiment.model_validate(content), tmp_path / "whole")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_a_judge_of_the_testbed_has_a_plan_without_building_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A judge's identity names the testbed's entry by its key, which must not be resolved again as a reference."""
    monkeypatch.setenv("STAYALIGNED_CACHE", str(tmp_path))
    content = {
        "model": "testbed:aligned",
        "training": None,
        "harmful_prompts": "testbed:data/harmful-prompts.jsonl",
        "judges": [{"name": "classifier", "model": "testbed:judge"}],
    }
    plans = [plan_experiment(Experiment.model_validate({**content, "seed": seed})) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].judges != plans[2].judges
    assert plans[0].id != plans[2].id
    assert not list(tmp_path.iterdir())
