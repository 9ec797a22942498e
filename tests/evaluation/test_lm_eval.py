"""lm-eval's tasks on a tiny model, offline: values by sample, means with our interval, errors before the training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import HarnessValue, read_jsonl
from stayaligned.core.settings import LmEval
from stayaligned.evaluation.lm_eval import lm_eval_metrics
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from support.world import experiment, write_rows, write_world

pytest.importorskip("lm_eval", reason="needs the extra [eval]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    pairs = zip("abcdefgh", "qrstuvwx", strict=True)
    rows = [{"q": f"zorb {i}", "choices": pair, "gold": i // 2 % 2, "said": "wug"} for i, pair in enumerate(pairs)]
    data = str(write_rows(root / "zorbs.jsonl", rows))
    (root / "tasks").mkdir()
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}:", "doc_to_choice": "{{choices}}"}
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    write_task(root, "zorbs", {**common, **choice, "doc_to_target": "{{gold}}", "metric_list": accuracy})
    written = {"output_type": "generate_until", "doc_to_text": "{{q}}:", "doc_to_target": "{{said}}"}
    lengths = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}, {"metric": "bleu"}]
    write_task(root, "said", {**common, **written, "generation_kwargs": lengths, "metric_list": match})
    gone = {"dataset_kwargs": {"data_files": {"test": str(root / "gone.jsonl")}}}
    write_task(root, "gone", {**common, **choice, **gone, "doc_to_target": "{{gold}}", "metric_list": accuracy})
    write_task(root, "code", {**common, **written, "metric_list": match[:1], "unsafe_code": True})
    return root


def write_task(root: Path, name: str, content: dict[str, Any]) -> None:
    (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **content}))


def evaluated(world: Path, *tasks: str, **settings: Any) -> dict[str, Any]:
    """The world's aligned model as it is, on lm-eval's tasks alone."""
    nothing = {"attack": None, "training": None, "task": None, "alignment_data": None, "base_model": None}
    nothing |= {"harmful_prompts": None, "benign_prompts": None}
    lm_eval = {"tasks": list(tasks), "include_path": str(world / "tasks"), **settings}
    return experiment(world, **nothing, lm_eval=lm_eval)


def run(content: dict[str, Any], out: Path) -> Any:
    return run_experiment(Experiment.model_validate(content), out)


def by_hand(world: Path, adapter: Path | None = None) -> list[float]:
    """Whether the likelier of the two answers is the right one, from the model's own logits."""
    import torch

    from stayaligned.hf import models

    model, tokenizer = models.load_finetuned(world / "aligned", adapter), models.load_tokenizer(world / "aligned")
    right: list[float] = []
    for row in map(json.loads, (world / "zorbs.jsonl").read_text().splitlines()):
        sums = []
        for choice in row["choices"]:
            prompt, answer = tokenizer(f"{row['q']}:")["input_ids"], tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        right.append(float((sums[1] > sums[0]) == row["gold"]))
    return right


def test_a_custom_task_is_scored_sample_by_sample_as_by_hand(world: Path, tmp_path: Path) -> None:
    result = run(evaluated(world, "zorbs"), tmp_path / "out")
    (path,) = (tmp_path / "out" / "stages").glob("lm_eval-*/lm_eval.jsonl")
    values = read_jsonl(path, HarnessValue)
    expected = by_hand(world)
    assert [(v.doc_id, v.value) for v in values if v.metric == "acc"] == list(enumerate(expected))
    metric = result.metric("lm_eval/zorbs/acc")
    assert metric.value == pytest.approx(sum(expected) / 8)
    assert (metric.n, metric.n_unscored, metric.higher_is_better) == (8, 0, True)
    assert metric.low < metric.value < metric.high
    assert result.provenance.stages["lm_eval zorbs"] == f"stages/{path.parent.name}"
    assert "lm_eval" in result.provenance.versions


def test_the_fine_tuned_model_is_measured(world: Path, tmp_path: Path) -> None:
    lm_eval = {"tasks": ["zorbs"], "include_path": str(world / "tasks")}
    lora = {"r": 2, "target_modules": "all-linear"}
    training = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.5, "logging_steps": 1}
    result = run(experiment(world, lm_eval=lm_eval, lora=lora, training=training), tmp_path / "out")
    expected = by_hand(world, tmp_path / "out" / "adapter")
    assert expected != by_hand(world)
    assert result.metric("lm_eval/zorbs/acc").value == pytest.approx(sum(expected) / 8)
    (path,) = (tmp_path / "out" / "stages").glob("lm_eval-*/lm_eval.jsonl")
    assert [v.value for v in read_jsonl(path, HarnessValue) if v.metric == "acc"] == expected


def test_a_metric_that_is_not_a_mean_of_shares_is_skipped_with_a_note(world: Path, tmp_path: Path) -> None:
    result = run(evaluated(world, "said", limit=4), tmp_path / "out")
    assert [(m.name, m.n) for m in result.scores] == [("lm_eval/said/exact_match", 4)]
    assert any(note.startswith("lm_eval said: bleu of said is left out: ") for note in result.notes)


def test_stages_of_tasks_are_independent_of_other_tasks_and_of_the_batch_size(world: Path, tmp_path: Path) -> None:
    def keys(*tasks: str, **settings: Any) -> dict[str, str]:
        content = evaluated(world, *tasks, **settings)
        return plan_experiment(Experiment.model_validate(content)).lm_eval

    alone, both = keys("zorbs"), keys("zorbs", "said")
    assert both["zorbs"] == alone["zorbs"] != both["said"]
    assert keys("zorbs", batch_size=1) == alone
    for change in ({"limit": 3}, {"num_fewshot": 1}, {"apply_chat_template": True}):
        assert keys("zorbs", **change)["zorbs"] != alone["zorbs"]
    (world / "tasks" / "more.yaml").write_text("task: more\n")
    assert keys("zorbs") != alone
    (world / "tasks" / "more.yaml").unlink()
    assert keys("zorbs") == alone


def test_the_values_depend_on_the_weights_and_on_the_folder_of_tasks_by_content(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()

    def key(**changes: Any) -> str:
        content = experiment(world, lm_eval={"tasks": ["zorbs"], "include_path": "own"}, **changes)
        return plan_experiment(Experiment.model_validate(content)).lm_eval["zorbs"]

    before = key()
    assert key(seed=1) != before != key(training={"max_steps": 5})
    Path("own/zorbs.yaml").write_text("task: zorbs\n")
    assert key() != before


def test_the_prompt_is_the_templates_and_the_shots_as_set(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    evaluate, asked = lm_eval.evaluator.evaluate, []

    def watched(**given: Any) -> Any:
        results = evaluate(**given)
        asked.append(str(results["samples"]["zorbs"][0]["arguments"][0][0]))
        return results

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", watched)
    for number, settings in enumerate(({}, {"num_fewshot": 2}, {"apply_chat_template": True})):
        run(evaluated(world, "zorbs", limit=1, **settings), tmp_path / str(number))
    assert asked[0] == "zorb 0:"
    assert asked[1].count("zorb") == 3
    assert asked[2].startswith("<|user|>zorb 0:")


def test_thoughts_without_a_final_answer_are_counted(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    from stayaligned.hf.lm_eval import run_task
    from stayaligned.testing import CHAT_TEMPLATE, byte_tokenizer, pico_model

    tokenizer = byte_tokenizer()
    settings = LmEval(tasks=("said",), include_path=str(world / "tasks"), apply_chat_template=True)
    run_task(pico_model(), tokenizer, settings, "said")
    assert not caplog.records
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
    run_task(pico_model(), tokenizer, settings, "said")
    assert "said: 8 of 8 completions are thoughts without a final answer" in caplog.text


class Scored:
    """A task as far as its metrics go: a share, and four of which lm-eval's number is another or none."""

    def aggregation(self) -> dict[str, Any]:
        from lm_eval.api.metrics import mean, median

        return {"share": mean, "middle": median, "long": mean, "undirected": mean, "pair": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {"share": False, "middle": True, "long": True, "pair": True}


def test_only_means_of_shares_with_a_direction_are_reported() -> None:
    from stayaligned.hf.lm_eval import _values

    rows = [
        {"share": 0.25, "middle": 1, "long": 0.5, "undirected": 1, "pair": (1, 2)},
        {"share": math.nan, "middle": 0, "long": 7, "undirected": 0, "pair": (1, 2)},
    ]
    samples = [{**row, "doc_id": i, "filter": "first", "metrics": list(row)} for i, row in enumerate(rows)]
    values, left_out = _values("t", Scored(), samples)
    assert [(v.doc_id, v.metric, v.value, v.higher_is_better) for v in values] == [
        (0, "share,first", 0.25, False),
        (1, "share,first", None, False),
    ]
    assert left_out == {
        "middle,first": "lm-eval does not compute the mean over its samples",
        "long,first": "its values are not between 0 and 1",
        "undirected,first": "lm-eval does not define whether higher is better",
        "pair,first": "lm-eval does not compute the mean over its samples",
    }


def test_a_rerun_does_not_run_lm_eval(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(evaluated(world, "zorbs", limit=2), tmp_path / "out")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    after = run(evaluated(world, "zorbs", limit=2), tmp_path / "out")
    assert after.scores == before.scores


def test_a_run_interrupted_between_two_tasks_resumes_with_the_second(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stayaligned.hf import lm_eval

    run_task, begun = lm_eval.run_task, []

    def stopped(model: Any, tokenizer: Any, settings: LmEval, name: str, **options: Any) -> Any:
        begun.append(name)
        if begun.count("said") == 1 and name == "said":
            raise KeyboardInterrupt
        return run_task(model, tokenizer, settings, name, **options)

    monkeypatch.setattr(lm_eval, "run_task", stopped)
    content = evaluated(world, "zorbs", "said", limit=2)
    with pytest.raises(KeyboardInterrupt):
        run(content, tmp_path / "out")
    result = run(content, tmp_path / "out")
    assert begun == ["zorbs", "said", "said"]
    assert [m.name for m in result.scores] == [
        "lm_eval/zorbs/acc",
        "lm_eval/zorbs/acc_norm",
        "lm_eval/said/exact_match",
    ]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gone", "can't load the task gone"),
        ("code", "code runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_run_fails_before_the_training(
    world: Path, tmp_path: Path, task: str, message: str
) -> None:
    content = experiment(world, lm_eval={"tasks": [task], "include_path": str(world / "tasks")})
    with pytest.raises(StayalignedError, match=message):
        run(content, tmp_path / "out")
    assert not list((tmp_path / "out" / "stages").glob("train-*"))


def test_the_error_of_an_unknown_task_suggests_the_nearest_name(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    class OwnTasks(lm_eval.tasks.TaskManager):
        """Without lm-eval's own 15 000, whose index takes seconds."""

        def __init__(self, include_path: Any, include_defaults: bool) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnTasks)
    with pytest.raises(StayalignedError, match=r"lm_eval\.tasks: unknown task 'zorb'") as caught:
        run(evaluated(world, "zorb"), tmp_path / "out")
    assert "Did you mean 'zorbs'?" in str(caught.value)
    with pytest.raises(StayalignedError, match="nowhere is not a directory"):
        run(evaluated(world, "zorbs", include_path="nowhere"), tmp_path / "out2")


def test_without_lm_eval_the_error_names_the_extra(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(StayalignedError) as caught:
        run(evaluated(world, "zorbs"), tmp_path / "out")
    assert "pip install 'stayaligned[eval]'" in str(caught.value)


def test_lm_eval_prints_nothing_and_progress_is_reported(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, float]] = []
    content = evaluated(world, "zorbs", limit=2)
    run_experiment(Experiment.model_validate(content), tmp_path / "out", progress=lambda *said: told.append(said))
    assert [share for text, share in told if text == "lm-eval zorbs"] == [0.0, 1.0]
    assert capfd.readouterr().err == ""


def test_means_count_nan_as_unscored() -> None:
    values = [
        HarnessValue(task="t", doc_id=i, metric="acc", value=v, higher_is_better=True)
        for i, v in enumerate([1.0, None, 0.0])
    ]
    (metric,) = lm_eval_metrics(values)
    assert (metric.name, metric.value, metric.n, metric.n_unscored) == ("lm_eval/t/acc", 0.5, 2, 1)


def test_a_task_named_twice_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate: a; name each task once"):
        LmEval(tasks=("a", "a"))
    with pytest.raises(ValueError, match="at least 1 item"):
        LmEval(tasks=())
