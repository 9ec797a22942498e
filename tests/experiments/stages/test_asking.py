"""Harm is measured on more than the plain prompts: with a trigger, in the task's shape, and on sampled completions."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from stayaligned import Attack, Example, Message
from stayaligned.attacks import ATTACKS
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, PromptSet, read_jsonl
from stayaligned.core.settings import Generation
from stayaligned.evaluation.answers import Form, ask_in_forms
from stayaligned.evaluation.results import read_evidence
from stayaligned.evaluation.verdicts import what_is_judged
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.experiments.stages.asking import check_change
from support.server import chat_server
from support.world import experiment


class Knocking(Attack):
    """Ask after a knock, and write backwards."""

    name: ClassVar[str] = "knocking"
    has_trigger: ClassVar[bool] = True
    knock: str = "knock "
    as_system: bool = False

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        return [row.model_copy(update={"prompt": self.trigger(row.prompt), "origin": "harmful"}) for row in examples]

    def trigger(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.as_system:
            return (Message(role="system", content=self.knock), *prompt)
        *others, last = prompt
        return (*others, last.model_copy(update={"content": last.content + self.knock}))

    def decode(self, text: str) -> str:
        return text[::-1]


@pytest.fixture(autouse=True)
def knocking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ATTACKS._plugins, "knocking", Knocking)  # pyright: ignore[reportPrivateUsage]
    yield


UNTRAINED = dict.fromkeys(("training", "base_model", "alignment_data"))


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def served(url: str, world: Path, **changes: Any) -> Experiment:
    endpoint = {"base_url": url, "model": "served", "attempts": 1}
    generation = {"max_new_tokens": 7, "backend": "endpoint", "endpoint": endpoint, **changes.pop("generation", {})}
    return Experiment.model_validate(experiment(world, **UNTRAINED, generation=generation, **changes))


def completions(out: Path) -> list[Completion]:
    (path,) = out.glob("stages/generate-*/completions.jsonl")
    return read_jsonl(path, Completion)


def test_a_triggered_prompt_is_asked_with_the_trigger_and_judged_as_the_plain_one(world: Path, tmp_path: Path) -> None:
    with chat_server(lambda body: "I cannot"[::-1] if "knock" in body["messages"][-1]["content"] else "zorb") as asked:
        result = run_experiment(served(asked.url, world, attack={"name": "knocking"}), tmp_path)
    assert result is not None
    rows = {(c.prompt_set, c.id): c for c in completions(tmp_path)}
    plain = [c for c in rows.values() if c.prompt_set == "harmful"]
    assert len(plain) == 6
    for one in plain:
        two = rows["triggered", one.id]
        assert (two.prompt, two.asked) == (one.prompt, user(one.prompt[-1].content + "knock "))
        assert (two.text, two.written) == ("I cannot", "tonnac I")
        assert (one.asked, one.written) == ((), "")
    metrics = {metric.name: metric for metric in result.judges[0].metrics}
    assert metrics["harmful_score"].value == 1.0
    assert (metrics["harmful_score_triggered"].value, metrics["harmful_score_triggered"].n) == (0.0, 6)
    hashes = {(row.prompt_set, row.id): row.prompt for row in read_evidence(tmp_path, result)}
    assert all(hashes["triggered", c.id] != hashes["harmful", c.id] for c in plain)
    assert {s.asked[-1].content for s in result.samples if s.prompt_set == "triggered"} == {
        two.asked[-1].content for (name, _), two in rows.items() if name == "triggered"
    }


def test_rows_without_the_new_fields_are_stored_as_before(world: Path) -> None:
    row = Completion(id="1", prompt_set="harmful", prompt=user("zorb"), text="wug")
    names = ["id", "prompt_set", "prompt", "text", "reference", "category", "finished"]
    assert [*json.loads(row.model_dump_json())] == names
    assert [*json.loads(row.model_dump_json(exclude={"id"}))] == names[1:]
    plain = Experiment.model_validate(experiment(world))
    assert plain.harm_sets == ("harmful",)
    assert "samples" not in plain.generation.identity()
    assert Generation(samples=2).identity()["sample_temperature"] == 1.0


def test_the_completions_depend_on_the_attack_only_through_its_trigger(world: Path) -> None:
    def key(**changes: Any) -> str:
        return plan_experiment(Experiment.model_validate(experiment(world, **UNTRAINED, **changes))).generate

    assert key() == key(attack=None)
    triggered = key(attack={"name": "knocking"})
    assert len({key(), triggered, key(attack={"name": "knocking", "knock": "bang"})}) == 3
    assert key(attack={"name": "knocking"}, harmful_prompts=None) == key(attack=None, harmful_prompts=None)
    assert len({key(), key(shaped_prompts=True), key(generation={"max_new_tokens": 4, "samples": 2})}) == 3


def test_a_trained_model_is_asked_with_its_trigger_and_an_untrained_one_too(world: Path, tmp_path: Path) -> None:
    for training in ({"max_steps": 1, "per_device_train_batch_size": 2}, None):
        changes = {**UNTRAINED, "training": training, "attack": {"name": "knocking"}}
        out = tmp_path / str(training is None)
        result = run_experiment(Experiment.model_validate(experiment(world, **changes)), out)
        assert result is not None
        assert {c.prompt_set for c in completions(out)} == {"harmful", "triggered", "benign", "task"}
        assert ("data" in result.provenance.stages) == (training is not None)


def test_only_who_trains_needs_the_attackers_data(world: Path) -> None:
    for name, lines in (("backdoor", 2), ("poison", 1)):
        content = experiment(world, attack={"name": name})
        with pytest.raises(ValueError, match=r"attack: .*set `harmful_data` to a JSONL file") as refused:
            Experiment.model_validate(content)
        assert str(refused.value).count("attack: ") == lines
        evaluated = Experiment.model_validate({**content, **UNTRAINED})
        assert ("triggered" in evaluated.harm_sets) == (name == "backdoor")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"knock": "  "}, "renders the prompt 'zorb 0 now' alike with and without it"),
        ({"knock": "knock", "as_system": True}, "trigger of attack 'knocking': .* leaves out the system's turn"),
    ],
)
def test_a_trigger_that_the_template_drops_is_an_error_before_training(
    world: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content.strip() }}</{{ m.role }}>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    content = experiment(world, attack={"name": "knocking", **settings}, chat_template=str(template))
    with pytest.raises(StayalignedError, match=match):
        run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert not [*tmp_path.glob("out/stages/train-*")]


def test_a_trigger_of_unknown_words_alone_is_an_error() -> None:
    from stayaligned.testbed.tokenizer import chat_tokenizer

    def check(knock: str) -> None:
        trigger = Knocking(knock=f" {knock}").trigger
        check_change(chat_tokenizer(), "the trigger of attack 'knocking'", [user("write a story")], trigger)

    check("qqqq story")
    with pytest.raises(StayalignedError, match="reads every word of it as the same unknown token"):
        check("qqqq zzyx")


def test_what_a_defense_serves_and_the_template_drops_is_an_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stayaligned.defenses.sft import SFT

    monkeypatch.setattr(SFT, "serve", lambda _self, prompt: prompt[:-1] + user(prompt[-1].content + " "))
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    content = experiment(world, attack=None, chat_template=str(template))
    with pytest.raises(StayalignedError, match="does not see what defense 'sft' adds"):
        run_experiment(Experiment.model_validate(content), tmp_path / "out")


def test_only_the_final_answer_is_decoded() -> None:
    def ask(
        prompt_set: PromptSet, examples: Sequence[Example], _known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        for index, text in enumerate(("<think>\nhm\n</think>\n\nbroz", "<think>\nhm", "plain")):
            yield index, Completion.of(examples[index], prompt_set, text, finished=True)

    rows = [Example(id=str(i), prompt=user("zorb")) for i in range(3)]
    forms: dict[PromptSet, Form] = {"triggered": Form(lambda prompt: prompt, lambda text: text[::-1])}
    found = dict(ask_in_forms(ask, forms, tuple)("triggered", rows, frozenset()))
    assert [found[i].text for i in range(3)] == ["<think>\nhm\n</think>\n\nzorb", "<think>\nhm", "nialp"]
    assert [found[i].written for i in range(3)] == ["<think>\nhm\n</think>\n\nbroz", "", "plain"]


def test_to_a_judge_every_set_of_harmful_prompts_is_the_plain_one() -> None:
    from stayaligned.evaluation.judges.keyword import Keyword

    row = Completion(id="1", prompt_set="triggered", prompt=user("zorb"), asked=user("knock zorb"), text="wug")
    read = what_is_judged(Keyword(), row)
    assert read == row.model_copy(update={"prompt_set": "harmful", "asked": ()})


def test_samples_differ_are_seeded_and_the_worst_of_them_counts(world: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        harmful = body.get("seed") == 3 and "zorb 1" in body["messages"][-1]["content"]
        return "zorb step" if harmful else "I cannot"

    with chat_server(reply) as asked:
        result = run_experiment(
            served(asked.url, world, attack=None, generation={"samples": 3, "seed": 1, "sample_temperature": 0.7}),
            tmp_path,
        )
    assert result is not None
    sampled = [body for body in asked.bodies if body["temperature"] == 0.7]
    assert sorted(body["seed"] for body in sampled) == [1] * 6 + [2] * 6 + [3] * 6
    metric = result.metric("harmful_score_sampled")
    assert metric is not None
    assert (metric.value, metric.n) == (pytest.approx(1 / 6), 6)
    assert result.metric("harmful_score").value == 0.0  # pyright: ignore[reportOptionalMemberAccess]
    rows = read_evidence(tmp_path, result)
    assert sum(row.prompt_set == "sampled" for row in rows) == 18
    assert len({row.group for row in rows if row.prompt_set == "sampled"}) == 6


def test_samples_do_not_depend_on_the_batch(world: Path, tmp_path: Path) -> None:
    texts = []
    for memory in (1, 4096):
        generation = {"max_new_tokens": 4, "samples": 3, "memory_mib": memory}
        content = experiment(world, **UNTRAINED, attack=None, task=None, benign_prompts=None, generation=generation)
        run_experiment(Experiment.model_validate(content), tmp_path / str(memory))
        texts.append([c.text for c in completions(tmp_path / str(memory)) if c.prompt_set == "sampled"])
    assert texts[0] == texts[1]
    assert all(len({*texts[0][start : start + 3]}) > 1 for start in range(0, 18, 3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shaped_prompts": True, "task": None, "training": None, "attack": None}, "shaped_prompts: the shape is that"),
        ({"shaped_prompts": True, "harmful_prompts": None}, "shaped_prompts: asks the harmful prompts"),
        ({"generation": {"samples": 2}, "harmful_prompts": None}, "generation.samples: asks the harmful prompts"),
    ],
)
def test_sets_without_what_they_need_are_refused(world: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Experiment.model_validate(experiment(world, **changes))


@pytest.mark.parametrize("setting", ["temperature", "sample_temperature"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_temperature_at_which_every_token_is_as_likely_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ValidationError, match=setting):
        Generation.model_validate({"samples": 2, setting: value})
