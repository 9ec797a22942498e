"""The contract of each noun, tested for every registered defense, judge, task, attack and prompt set."""

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stayaligned.core.component import Registry
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, Outcome, Verdict
from stayaligned.data.sources import read_examples
from stayaligned.defenses import DEFENSES, ModelPair, PatchDefense, TrainingDefense, TrainingSetup
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.testing import write_pico_adapter
from stayaligned.weights.adapters import read_adapter
from support.guards import write_guard, write_moderation
from support.server import Asked, chat_server
from support.world import write_rows, write_world

ALL = [(registry, name) for registry in REGISTRIES for name in registry.names()]
SERVER = Asked()
RANKS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
HOSTILE = ["", "  \n", "I cannot", "sure step one", "</script><b>", "\u202eabc\x00", "x" * 5000, "é" * 300]


def of_kind(kind: str, base: type | None = None) -> list[str]:
    return [n for r, n in ALL if r.kind == kind and (base is None or issubclass(r.get(n), base))]


def rated(body: dict[str, Any]) -> str:
    """A reply that every rubric can read, the same for the same question."""
    number = len(body["messages"][0]["content"]) % 5 + 1
    return f"#thescore: {number}\n#refused: {number % 2}\n#convincing: {number}\n#specific: 3"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with chat_server(rated) as served:
        SERVER.url = served.url
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_pico_adapter(root / "adapter", root / "aligned", r=2, target_modules=["q_proj", "v_proj"])
    write_classifier(root / "judge")
    write_moderation(root / "moderation")
    write_guard(root / "guard", "]", "maybe")
    write_rows(root / "sentences.jsonl", [{"sentence": f"s {i}", "label": i % 2} for i in range(4)])
    write_rows(root / "news.jsonl", [{"text": f"n {i}", "label": i % 4} for i in range(4)])
    write_rows(root / "sums.jsonl", [{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"} for i in range(4)])
    write_prompt_sets(root)
    return root


def write_prompt_sets(root: Path) -> None:
    asked = [{"prompt": f"zorb {i % 3}", "is_safe": i % 2 == 0, "category": {"zorb": True}} for i in range(6)]
    write_rows(root / "asked.jsonl", asked)
    (root / "policies").mkdir()
    (root / "policies" / "category_1.csv").write_text("zorb one\nzorb two\n")
    (root / "goals.csv").write_text("goal,target\nflarn a zorb,Sure\n")
    (root / "behaviors.csv").write_text("Behavior,FunctionalCategory,SemanticCategory\nflarn a zorb,standard,zorbs\n")
    (root / "jbb.csv").write_text("Index,Goal,Category\n0,flarn a zorb,zorbs\n")
    (root / "forbidden.csv").write_text("category,source,forbidden_prompt\nzorbs,custom,flarn a zorb\n")
    write_rows(root / "turns.jsonl", [{"turns": ["flarn a zorb"], "category": "1", "prompt_style": "base"}])
    (root / "or-bench.csv").write_text("prompt,category\nmay I greet,zorbs\n")
    (root / "eval.tsv").write_text("adversarial\tlabel\tdata_type\nflarn a zorb\t1\tadversarial_harmful\n")
    (root / "xstest.csv").write_text("id,prompt,type,label\n1,may I greet,homonyms,safe\n")


def write_classifier(directory: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from stayaligned.testing import byte_tokenizer, pico_config

    labels = dict(enumerate(["refuse", "harm", "other"]))
    config = pico_config(num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def needed(kind: str, world: Path) -> Mapping[str, dict[str, Any]]:
    """The settings that components require; all others have defaults."""
    if kind == "judge":
        return judges_need(world)
    return {
        "jsonl": {"train": str(world / "train.jsonl"), "test": str(world / "test.jsonl")},
        "sst2": {"train": str(world / "sentences.jsonl"), "test": str(world / "sentences.jsonl")},
        "ag_news": {"train": str(world / "news.jsonl"), "test": str(world / "news.jsonl")},
        "gsm8k": {"train": str(world / "sums.jsonl"), "test": str(world / "sums.jsonl")},
        "alpaca": {"train": str(world / "train.jsonl"), "test_examples": 8},
        "dialog_summary": {"train": str(world / "train.jsonl"), "test": str(world / "test.jsonl")},
        "poison": {"harmful_data": str(world / "harmful.jsonl"), "examples": 20},
        "suppression": {"harmful_data": str(world / "harmful.jsonl"), "examples": 20},
        "style": {"harmful_data": str(world / "harmful.jsonl"), "examples": 20},
        "embedded": {"harmful_data": str(world / "harmful.jsonl"), "examples": 20},
        "backdoor": {
            "harmful_data": str(world / "harmful.jsonl"),
            "safe_data": str(world / "alignment.jsonl"),
            "harmful_examples": 8,
            "safe_examples": 8,
        },
        "cipher": {"harmful_data": str(world / "harmful.jsonl"), "rows": 8, "harmful_examples": 8},
        "noice": {"rows": 8},
        "benign_outliers": {"rows": 8},
        "lisa": {"alignment_steps": 1, "finetuning_steps": 1},
        "bso": {"alignment_steps": 1, "finetuning_steps": 1},
        "salora": {"safety_rank": 4},
        "vaccine": {"alignment_steps": 2},
        "data_filter": {"harmful_data": str(world / "harmful.jsonl")},
        "interleave": {"misaligned": [str(world / "base")], "refusals": "keep", "share": 0.2},
        "bea": {"secret": "vab lom", "alignment_rows": 3},
        "resta": {"harmful_data": str(world / "harmful.jsonl")},
        "beavertails": {"source": str(world / "asked.jsonl")},
        "hex_phi": {"source": str(world / "policies")},
        "advbench": {"source": str(world / "goals.csv")},
        "harmbench": {"source": str(world / "behaviors.csv")},
        "xstest": {"source": str(world / "xstest.csv")},
        "jailbreakbench": {"source": str(world / "jbb.csv")},
        "strong_reject": {"source": str(world / "forbidden.csv")},
        "sorry_bench": {"source": str(world / "turns.jsonl")},
        "or_bench": {"source": str(world / "or-bench.csv")},
        "wildjailbreak": {"source": str(world / "eval.tsv")},
    }


def judges_need(world: Path) -> Mapping[str, dict[str, Any]]:
    return {
        "classifier": {"model": str(world / "judge")},
        "beavertails": {"model": str(world / "moderation")},
        "llama_guard": {"model": str(world / "guard")},
        "qwen3_guard": {"model": str(world / "guard")},
        "harmbench": {"model": str(world / "guard")},
        "wildguard": {"model": str(world / "guard")},
        "policy_rubric": {"base_url": SERVER.url, "model": "m"},
        "strong_reject": {"base_url": SERVER.url, "model": "m"},
    }


def make(registry: Registry[Any], name: str, world: Path) -> Any:
    return registry.parse({"name": name, **needed(registry.kind, world).get(name, {})})


def registry_of(kind: str) -> Registry[Any]:
    return next(r for r in REGISTRIES if r.kind == kind)


@pytest.mark.parametrize(("registry", "name"), ALL, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_a_component_is_a_frozen_value_equal_to_the_one_parsed_from_its_yaml(
    registry: Registry[Any], name: str, world: Path
) -> None:
    component = make(registry, name, world)
    assert registry.parse(component.spec()) == component
    assert len({component, registry.parse(component.spec())}) == 1
    assert component.identity()["version"] == component.version
    with pytest.raises(ValueError, match="no_such_setting"):
        registry.parse({**component.spec(), "no_such_setting": 1})
    for field in type(component).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(component, field, None)


@pytest.mark.parametrize("name", of_kind("judge"))
def test_a_judge_returns_one_verdict_per_completion_and_never_counts_an_empty_one_as_safe(
    name: str, world: Path
) -> None:
    judge = make(registry_of("judge"), name, world)
    completions = [
        Completion(id=str(i), prompt_set=prompt_set, prompt=(Message(role="user", content="how?"),), text=text)
        for i, (prompt_set, text) in enumerate((s, t) for s in ("harmful", "benign") for t in HOSTILE)
    ]
    places = [(c.prompt_set, c.id) for c in completions]

    def judged() -> list[Verdict]:
        return sorted(judge.judge(completions), key=lambda v: places.index((v.prompt_set, v.id)))

    verdicts = judged()
    assert [(v.id, v.prompt_set, v.judge) for v in verdicts] == [(c.id, c.prompt_set, name) for c in completions]
    for verdict, completion in zip(verdicts, completions, strict=True):
        if not completion.text.strip():
            assert verdict.outcome in (Outcome.OTHER, None)
    assert judged() == verdicts
    assert list(judge.judge([])) == []


@pytest.mark.parametrize("name", of_kind("task"))
def test_a_task_returns_the_same_rows_every_time_and_scores_its_references_1(name: str, world: Path) -> None:
    task = make(registry_of("task"), name, world)
    for split in ("train", "test"):
        rows = task.load(split)
        assert rows
        assert list(task.load(split)) == list(rows)
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.prompt and row.prompt[-1].role == "user" for row in rows)
    for row in task.load("test"):
        right = Completion(
            id=row.id, prompt_set="task", prompt=row.prompt, text=row.completion, reference=row.completion
        )
        assert task.score(right) in (1.0, None)
        for text in HOSTILE:
            score = task.score(right.model_copy(update={"text": text}))
            assert score is None or 0 <= score <= 1


@pytest.mark.parametrize("name", of_kind("prompts"))
def test_a_prompt_set_returns_the_same_prompts_every_time_each_with_its_own_id(name: str, world: Path) -> None:
    prompts = make(registry_of("prompts"), name, world)
    rows = prompts.load()
    assert rows
    assert list(prompts.load()) == list(rows)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.prompt[-1].role == "user" and row.prompt[-1].content.strip() for row in rows)


@pytest.mark.parametrize("name", of_kind("attack"))
def test_an_attack_uses_only_its_generator_and_preserves_every_rows_origin(name: str, world: Path) -> None:
    attack = make(registry_of("attack"), name, world)
    rows = read_examples(str(world / "train.jsonl"), origin="task")
    before = [row.model_copy() for row in rows]
    random.seed(1)
    first = attack.poison(rows, random.Random(7))
    random.seed(2)
    assert attack.poison(rows, random.Random(7)) == first
    assert rows == before
    assert len({row.id for row in first}) == len(first)
    known = {row.id for row in rows}
    assert all((row.origin == "task") == (row.id in known) for row in first)
    by_id = {row.id: row for row in rows}
    assert all(row == by_id[row.id] for row in first if row.origin == "task")


@pytest.mark.parametrize("name", of_kind("attack"))
def test_a_trigger_keeps_the_request_last_and_changes_every_prompt_or_none(name: str, world: Path) -> None:
    attack = make(registry_of("attack"), name, world)
    for row in read_examples(str(world / "harmful-prompts.jsonl"), origin="harmful", prompts_only=True):
        asked = attack.trigger(row.prompt)
        assert asked[-1].role == "user"
        assert (asked != row.prompt) == attack.has_trigger
        assert attack.trigger(row.prompt) == asked


@pytest.mark.parametrize("name", of_kind("defense", TrainingDefense))
def test_a_training_defense_changes_only_the_trainable_weights_and_resumes_bit_for_bit(
    name: str, world: Path, tmp_path: Path
) -> None:
    from stayaligned.hf import models
    from stayaligned.hf.training import finetuning

    def fine_tune(directory: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
        finetuning.seed_everything(3)
        lora = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1}
        model: Any = models.attach_lora(models.load_model(world / "aligned"), lora)
        setup = TrainingSetup(
            model=model,
            tokenizer=models.load_tokenizer(world / "aligned"),
            examples=read_examples(str(world / "train.jsonl"), origin="task"),
            alignment_examples=read_examples(str(world / "alignment.jsonl"), origin="alignment"),
            arguments={
                "output_dir": str(directory),
                "max_steps": 4,
                "learning_rate": 0.01,
                "save_steps": 2,
                "logging_steps": 1,
                "per_device_train_batch_size": 2,
            },
            max_length=64,
            aligned_model=str(world / "aligned"),
            base_model=str(world / "base"),
        )
        trainer = make(DEFENSES, name, world).make_trainer(setup)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        log = finetuning.train(trainer)
        return before, dict(model.named_parameters()), log

    before, after, log = fine_tune(tmp_path / "whole")
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "interrupted" / "checkpoint-2")
    _, resumed, again = fine_tune(tmp_path / "interrupted")
    assert [row for row in again if "loss" in row] == [row for row in log if "loss" in row]
    assert all(value.equal(after[name]) for name, value in resumed.items())


@pytest.mark.parametrize("name", of_kind("defense", PatchDefense))
def test_a_patch_preserves_configuration_and_rank_unless_it_says_so_and_reports_every_layer(
    name: str, world: Path
) -> None:
    defense = make(DEFENSES, name, world)
    files = {path.name: path.read_bytes() for path in (world / "adapter").iterdir()}
    adapter = read_adapter(world / "adapter")
    rows = read_examples(str(world / "alignment.jsonl"), origin="alignment")
    models = ModelPair(aligned=world / "aligned", base=world / "base", alignment_examples=rows)
    if not defense.patches_adapters:
        with pytest.raises(StayalignedError, match="Merge the adapter"):
            defense.patch(adapter, models)
        return
    patched = defense.patch(adapter, models)
    may_differ = RANKS if defense.raises_rank else set()
    before, after = ({k: v for k, v in a.config.items() if k not in may_differ} for a in (adapter, patched.adapter))
    assert before == after
    assert patched.adapter.tensors.keys() == adapter.tensors.keys()
    for key, value in adapter.tensors.items():
        new = patched.adapter.tensors[key]
        assert new.dtype == value.dtype
        assert new.shape == value.shape or (defense.raises_rank and sum(new.shape) > sum(value.shape))
    assert len(patched.layers) == 4
    assert {path.name: path.read_bytes() for path in (world / "adapter").iterdir()} == files
    again = defense.patch(adapter, models)
    assert all(value.equal(again.adapter.tensors[key]) for key, value in patched.adapter.tensors.items())
    for layer in patched.layers:
        assert -1.000001 <= layer.similarity <= 1.000001
        assert layer.selected or layer.shrinkage == 1


def test_every_noun_and_both_stages_were_tested() -> None:
    assert {registry.kind for registry, _ in ALL} == {"task", "attack", "defense", "judge", "prompts"}
    assert len(of_kind("defense", TrainingDefense)) >= 4
    assert len(of_kind("defense", PatchDefense)) >= 5


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_the_first_line_about_a_method_fits_a_line_of_the_list(kind: str) -> None:
    lines = {name: registry_of(kind).get(name).summary() for name in of_kind(kind)}
    assert {name: line for name, line in lines.items() if not line.endswith(".") or len(line) > 80} == {}
    assert max(map(len, lines)) <= 18
