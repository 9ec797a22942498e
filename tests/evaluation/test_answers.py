"""Answers are kept as they come: by a model here or by a server, and a torn line costs one."""

import json
import os
from pathlib import Path

import pytest
import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.core.settings import Generation, ServedModel
from stayaligned.evaluation.answers import Journal, answer_all, check_adapter_is_live
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.generate import generate
from stayaligned.experiments.stages.store import Store
from stayaligned.hf.generation.generate import complete_each
from stayaligned.testing import byte_tokenizer, write_pico_adapter
from support.generation import prompts, sharp
from support.server import Raw, chat_server, completion
from support.world import experiment, write_world


def examples(n: int) -> list[Example]:
    return [Example(id=f"e{i}", prompt=tuple(p), completion="r") for i, p in enumerate(prompts(n))]


def answer(example: Example) -> Completion:
    return Completion(id=example.id, prompt_set="harmful", prompt=example.prompt, text=f"\u2028 {example.id}\ud7ff")


def test_stored_completions_are_not_requested_again_and_the_order_is_the_examples(tmp_path: Path) -> None:
    rows, asked, shares = examples(6), list[int](), list[float]()

    def ask(_prompt_set, rows, known, stop_after=99):
        for count, index in enumerate(sorted(set(range(len(rows))) - known, reverse=True)):
            if count == stop_after:
                raise KeyboardInterrupt
            asked.append(index)
            yield index, answer(rows[index])

    journal = tmp_path / "stages" / ".a.answers"
    with pytest.raises(KeyboardInterrupt):
        answer_all(journal, {"harmful": rows}, lambda *a: ask(*a, stop_after=3), lambda *_: None)
    whole = journal.read_bytes()
    with journal.open("ab") as stream:
        stream.write(whole.splitlines(keepends=True)[0][:-9])
    found = answer_all(journal, {"harmful": rows}, ask, lambda _text, share, _detail: shares.append(share))
    assert found == [answer(row) for row in rows]
    assert sorted(asked) == list(range(6))
    assert shares == [4 / 6, 5 / 6, 1.0]
    assert journal.read_bytes().startswith(whole)
    # Of other prompts nothing is known.
    with Journal.open(journal) as kept:
        assert len(kept.known("harmful", rows)) == 6
        assert kept.known("benign", rows) == {}
        assert kept.known("harmful", examples(7)[1:]) == {}
    os.truncate(journal, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_missing_completions_equal_those_of_a_whole_run(temperature: float) -> None:
    model, tokenizer, rows = sharp(), byte_tokenizer(), [*examples(6), *examples(6)]
    settings = Generation(max_new_tokens=8, temperature=temperature)
    whole = dict(complete_each(model, tokenizer, rows, "harmful", settings))
    rest = dict(complete_each(model, tokenizer, rows, "harmful", settings, without=frozenset({0, 3, 7})))
    assert rest == {i: row for i, row in whole.items() if i not in (0, 3, 7)}


def test_a_server_replaces_the_model_and_gets_only_the_missing_prompts(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    broken = True

    def reply(body):
        text = body["messages"][-1]["content"]
        return Raw(status=400, body=b"{}") if broken and "zorb 4" in text else f"I blick {text}"

    with chat_server(reply) as asked:
        served = {"base_url": asked.url, "model": "served", "attempts": 1, "backoff_seconds": 0, "concurrency": 1}
        changes = {
            "generation": {"max_new_tokens": 7, "backend": "endpoint", "endpoint": served},
            "training": None,
            "task": None,
            "attack": None,
            "alignment_data": None,
            "base_model": None,
        }
        run = Context(Experiment.model_validate(experiment(world, **changes)), Store(tmp_path / "out"))
        with pytest.raises(StayalignedError, match="did not answer 1 of 6 harmful prompts"):
            generate(run)
        (journal,) = (tmp_path / "out" / "stages").glob(".generate-*.answers")
        assert len(journal.read_text().splitlines()) == 5
        broken = False
        rows = generate(run)
    assert [row.text for row in rows] == [f"I blick {row.prompt[-1].content}" for row in rows]
    assert len(asked.bodies) == 6 + 1 + 5
    assert all(body["model"] == "served" and body["max_tokens"] == 7 for body in asked.bodies)
    assert not journal.exists()
    (stage,) = (tmp_path / "out" / "stages").glob("generate-*/stage.json")
    assert json.loads(stage.read_text())["template_hash"] == "server"
    moved = experiment(world, **changes)
    moved["generation"]["endpoint"] = {**served, "base_url": "http://127.0.0.1:1/v1", "concurrency": 3}
    assert plan_experiment(Experiment.model_validate(moved)).generate == run.plan.generate
    moved["generation"]["endpoint"]["model"] = "another"
    assert plan_experiment(Experiment.model_validate(moved)).generate != run.plan.generate


def served_by(url: str, world: Path, **changes: object) -> Experiment:
    served = {"base_url": url, "model": "served", "attempts": 1, "concurrency": 1}
    generation = {"max_new_tokens": 7, "backend": "endpoint", "endpoint": served}
    without = dict.fromkeys(("training", "task", "attack", "alignment_data", "base_model"))
    return Experiment.model_validate(experiment(world, generation=generation, **without, **changes))


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"reasoning_effort": "low", "tags": ["a"]}])
def test_a_server_gets_the_arguments_of_the_chat_template(tmp_path: Path, arguments: dict) -> None:
    world = write_world(tmp_path / "world")
    with chat_server(lambda body: body["model"]) as asked:
        run = Context(served_by(asked.url, world, chat_template={"arguments": arguments}), Store(tmp_path / "out"))
        generate(run)
        probed = ServedModel(base_url=asked.url, model="adapter", base_model="base")
        check_adapter_is_live(probed, examples(2), arguments)
    assert len(asked.bodies) == 11 + 4
    assert all(body.get("chat_template_kwargs") == (arguments or None) for body in asked.bodies)
    assert all(("chat_template_kwargs" in body) == bool(arguments) for body in asked.bodies)
    plain = plan_experiment(served_by(asked.url, world))
    assert (run.plan.generate == plain.generate) == (not arguments)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("own.jinja", r"chat_template\.file: a server renders with its own"),
        ({"date": "2026-01-31"}, "writes its own date"),
    ],
)
def test_what_a_server_cannot_apply_of_a_chat_template_is_refused(tmp_path: Path, template: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        served_by("http://h/v1", tmp_path, chat_template=template)


def test_replies_that_do_not_say_why_they_ended_are_noted_once_and_kept(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    with chat_server(lambda _: completion("I blick", finish=None)) as asked:
        run = served_by(asked.url, world)
        result = run_experiment(run, tmp_path / "out")
    again = run_experiment(run, tmp_path / "out")
    assert result is not None and again is not None
    said = [note for note in result.notes if "`finish_reason`" in note]
    assert [note.split("does not say why ")[1][:24] for note in said] == [
        "6 harmful completions en",
        "5 benign completions end",
    ]
    assert again.notes == result.notes


def test_settings_that_change_no_completion_are_not_part_of_the_key(tmp_path: Path) -> None:
    world = write_world(tmp_path)

    def key(**generation: object) -> str:
        return plan_experiment(Experiment.model_validate(experiment(world, generation=generation))).generate

    assert key() == key(memory_mib=7)
    assert key() != key(max_new_tokens=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": {"backend": "endpoint"}, "training": None},
        {"generation": {"endpoint": {"base_url": "http://h/v1", "model": "m"}}, "training": None},
        {"generation": {"backend": "endpoint", "endpoint": {"base_url": "http://h/v1", "model": "m"}}},
    ],
)
def test_a_server_with_settings_that_need_a_local_model_is_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match=r"need each other|a server generates with its own model"):
        Experiment.model_validate(experiment(tmp_path, **changes))


def test_a_finetuned_model_is_not_used_with_another_template(tmp_path: Path, command) -> None:
    world = write_world(tmp_path)
    config = experiment(world, defenses=[{"name": "drop", "like": {"name": "safe_lora", "all_layers": True}}])
    (world / "run.yaml").write_text(yaml.safe_dump(config))
    code, shown = command("run", world / "run.yaml", "--out", world / "out")
    assert code == 0, shown
    (world / "aligned" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    evaluate = ("evaluate", world / "aligned", "--harmful-prompts", world / "harmful-prompts.jsonl")
    code, shown = command(*evaluate, "--adapter", world / "out" / "adapter", "--out", world / "a")
    assert code == 2
    assert "trained with another chat template" in " ".join(shown.split())
    code, shown = command(
        *evaluate, "--adapter", world / "out" / "adapter", "--out", world / "a", "other_template=true"
    )
    assert code == 0, shown
    says_nothing = write_pico_adapter(world / "silent", world / "aligned")
    code, shown = command(*evaluate, "--adapter", says_nothing, "--out", world / "b")
    assert code == 0, shown
