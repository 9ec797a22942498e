"""`align` against plain transformers and PEFT by hand: the same weights, merged once, whatever interrupts it."""

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from stayaligned import Alignment, align
from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress
from stayaligned.data.sources import read_examples
from stayaligned.experiments.align import ALIGNMENT_FILE
from stayaligned.experiments.config.alignment import load_alignment
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.experiments.stages.store import exclusive
from stayaligned.hf.features import PaddingCollator, encode_examples
from stayaligned.hf.quiet import quiet
from stayaligned.testing import byte_tokenizer, pico_model, write_pico_checkpoint
from stayaligned.weights.checkpoints import open_checkpoint, weights_fingerprint
from support.world import experiment, write_rows

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "save_steps": 2}


def alignment(world: Path, **changes: Any) -> Alignment:
    settings = {"data": str(world / "alignment.jsonl"), "lora": LORA, "training": TRAINING, "max_length": 64}
    return Alignment(**{"base_model": str(world / "base"), **settings, **changes})


def stored_as(directory: Path, dtype: torch.dtype, *, architecture: str = "llama", **model: Any) -> Path:
    pico_model(architecture, **model).to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def by_hand(base: Path, world: Path, lora: dict[str, Any] | None, out: Path) -> Any:
    """The trained model in fp32, its LoRA unmerged: transformers' Trainer and PEFT, and nothing of `alignment`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with quiet():
        set_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if lora is not None:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        settings = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.1, "save_strategy": "no"}
        arguments = {**settings, "seed": 0, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
        Trainer(
            model,
            TrainingArguments(str(out), **{**TRAINING, **arguments}),
            train_dataset=encode_examples(
                tokenizer, read_examples(str(world / "alignment.jsonl"), origin="alignment"), 64
            ),
            data_collator=PaddingCollator.of(tokenizer),
        ).train()
    return model


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_lora_is_the_base_plus_scaled_ba_rounded_once(world: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = stored_as(tmp_path / "base", dtype, seed=1)
    record = align(alignment(world, base_model=str(base)), tmp_path / "aligned")
    assert (record.rows, record.steps) == (12, 4)
    assert (record.trained_in, record.stored_in) == ("float32", str(dtype).removeprefix("torch."))

    before, after = weights_of(base), weights_of(tmp_path / "aligned")
    trained = by_hand(base, world, LORA, tmp_path / "by-hand")
    factors = {name: p.detach() for name, p in trained.named_parameters() if "lora_" in name}
    changed: set[str] = set()
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors.get(f"{module}.lora_{x}.default.weight") for x in "AB")
        if a is None or b is None:
            assert torch.equal(after[name], before[name])
            continue
        exact = before[name].double() + 2 * b.double() @ a.double()
        spacing = (torch.nextafter(exact.to(dtype), exact.to(dtype) * 2) - exact.to(dtype)).double().abs()
        assert bool(((after[name].double() - exact).abs() <= 0.5001 * spacing + 1e-8).all()), name
        changed |= {name} if not torch.equal(after[name], before[name]) else set()
    assert len(changed) == 4, "two modules in each of two layers"

    merged = trained.merge_and_unload().state_dict()
    assert all(torch.equal(after[name], merged[name].to(dtype)) for name in after)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_weights_are_trained_in_fp32_and_stored_as_the_base_is(
    world: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = stored_as(tmp_path / "base", dtype, seed=1)
    record = align(alignment(world, base_model=str(base), lora=None), tmp_path / "aligned")
    assert record.trained_in == "float32"
    after, trained = weights_of(tmp_path / "aligned"), by_hand(base, world, None, tmp_path / "by-hand").state_dict()
    assert all(torch.equal(after[name], trained[name].to(dtype)) for name in after)
    assert any(not torch.equal(after[name], tensor) for name, tensor in weights_of(base).items())
    configs = [json.loads((directory / "config.json").read_text()) for directory in (base, tmp_path / "aligned")]
    assert configs[0] == configs[1]


def test_a_lora_trains_bf16_weights_in_bf16_and_full_weights_on_request(world: Path, tmp_path: Path) -> None:
    base = stored_as(tmp_path / "base", torch.bfloat16, seed=1)
    record = align(alignment(world, base_model=str(base)), tmp_path / "lora")
    assert (record.trained_in, record.stored_in) == ("bfloat16", "bfloat16")
    told = alignment(world, base_model=str(world / "base"), lora=None, dtype="bfloat16")
    record = align(told, tmp_path / "full")
    assert (record.trained_in, record.stored_in) == ("bfloat16", "float32")


def test_the_result_is_a_checkpoint_with_a_record_of_its_alignment(world: Path, tmp_path: Path) -> None:
    record = align(alignment(world), tmp_path / "aligned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "aligned")
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert model.generation_config.eos_token_id == 1
    base, aligned = (json.loads((d / "config.json").read_text()) for d in (world / "base", tmp_path / "aligned"))
    assert base == aligned
    content = json.loads((tmp_path / "aligned" / ALIGNMENT_FILE).read_text())
    assert content == record.model_dump(mode="json")
    assert content["alignment"] == alignment(world).spec()
    assert content["inputs"].keys() == {"base_model", "data"}
    assert content["log"][-1]["train_loss"] > 0
    assert "2405.18641" in content["paper"]
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_pair_serves_lisa_and_safe_lora(world: Path, tmp_path: Path) -> None:
    align(alignment(world), tmp_path / "aligned")
    defenses = [{"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1}, {"name": "safe_lora", "threshold": 1}]
    content = experiment(world, model=str(tmp_path / "aligned"), base_model=str(world / "base"), defenses=defenses)
    content["lora"]["target_modules"] = ["down_proj"]
    result = run_experiment(Experiment.model_validate(content), tmp_path / "out")
    assert len(result.patches[0].layers) == 2
    assert all(layer.selected and layer.delta_norm for layer in result.patches[0].layers)


# ---- once, and only with these settings ----------------------------------------------------------------------------


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("it trains")


def test_a_complete_directory_is_reused_and_one_of_another_alignment_or_version_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = align(alignment(world), tmp_path / "aligned")
    monkeypatch.setattr("stayaligned.hf.training.finetuning.train", no_training)
    assert align(alignment(world), tmp_path / "aligned") == record
    moved = shutil.copytree(world / "base", tmp_path / "moved")
    assert align(alignment(world, base_model=str(moved)), tmp_path / "aligned") == record, "content counts, not place"
    (moved / "model.safetensors").write_bytes((world / "aligned" / "model.safetensors").read_bytes())
    others = {
        "training.max_steps": alignment(world, training={**TRAINING, "max_steps": 5}),
        "lora.r": alignment(world, lora={**LORA, "r": 3}),
        "data": alignment(world, data=str(world / "harmful.jsonl")),
        "base_model": alignment(world, base_model=str(moved)),
        "seed": alignment(world, seed=1),
    }
    for place, other in others.items():
        with pytest.raises(StayalignedError, match=f"another alignment; different: {place}\n"):
            align(other, tmp_path / "aligned")
    (tmp_path / "mine").mkdir()
    with pytest.raises(StayalignedError, match="mine exists already"):
        align(alignment(world), tmp_path / "mine")
    file = tmp_path / "aligned" / "alignment.json"
    content = json.loads(file.read_text())
    for changes, said in (
        ({"format_version": 0}, r"another version of stayaligned \(format 0, this version uses 1\)"),
        ({"steps": "many"}, r"alignment\.json: not a record of format version 1: steps: "),
    ):
        file.write_text(json.dumps({**content, **changes}))
        with pytest.raises(StayalignedError, match=said):
            align(alignment(world), tmp_path / "aligned")


class Stopped(BaseException):
    pass


def stop_at(share: float) -> Progress:
    def progress(text: str, done: float, _detail: str = "", /) -> None:
        if text == "align" and done >= share:
            raise Stopped

    return progress


def test_an_unfinished_directory_is_kept_once_it_has_a_checkpoint_and_resumed_by_the_same_settings_only(
    world: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "aligned", tmp_path / "aligned.unfinished"
    with pytest.raises(Stopped):
        align(alignment(world), out, progress=stop_at(0.25))
    assert not work.exists(), "nothing was saved, so nothing is lost"
    with pytest.raises(Stopped):
        align(alignment(world), out, progress=stop_at(0.75))
    assert (work / "checkpoint-2").is_dir()
    with pytest.raises(StayalignedError, match=r"aligned\.unfinished: belongs to another alignment; different: seed\n"):
        align(alignment(world, seed=1), out)
    (tmp_path / ".aligned.abc.partial").mkdir()  # of a process that was killed while it wrote
    record = align(alignment(world), out)
    assert record.steps == 4
    assert record.base_weights == weights_fingerprint(open_checkpoint(world / "base"))
    assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


def test_a_directory_with_other_files_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "aligned.unfinished").mkdir()
    (tmp_path / "aligned.unfinished" / "mine.txt").write_text("x")
    with pytest.raises(StayalignedError, match="holds files that this command did not write"):
        align(alignment(world), tmp_path / "aligned")
    base = shutil.copytree(world / "base", tmp_path / "base")
    with pytest.raises(StayalignedError, match="is inside the input"):
        align(alignment(world, base_model=str(base)), base / "aligned")


def test_two_processes_never_write_one_directory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exclusive(tmp_path / "aligned.unfinished"), pytest.raises(StayalignedError, match="another stayaligned proc"):
        align(alignment(world), tmp_path / "aligned")
    record = align(alignment(world), tmp_path / "first")

    @contextlib.contextmanager
    def after_the_other(work: Path) -> Generator[None]:
        shutil.copytree(tmp_path / "first", tmp_path / "second")
        with exclusive(work):
            yield

    monkeypatch.setattr("stayaligned.experiments.align.exclusive", after_the_other)
    monkeypatch.setattr("stayaligned.hf.training.finetuning.train", no_training)
    assert align(alignment(world), tmp_path / "second") == record


# ---- killed, diverged, out of disk ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_killed_alignment_resumes_to_the_same_bytes(world: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    training = {**TRAINING, "max_steps": 60, "save_steps": 1, "learning_rate": 1e-3}
    given = alignment(world, lora=lora, training=training)
    settings = [f"{name}={json.dumps(value)}" for name, value in given.spec().items() if name != "base_model"]
    command = [sys.executable, "-m", "stayaligned", "align", given.base_model, *settings]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")])
    work, deadline = tmp_path / "killed.unfinished", time.monotonic() + 120
    while not list(work.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    saved = [int(path.parent.name.split("-")[1]) for path in work.glob("checkpoint-*/trainer_state.json")]
    assert saved
    assert max(saved) < 60
    assert not (tmp_path / "killed").exists()

    align(given, tmp_path / "killed")
    align(given, tmp_path / "whole")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list(tmp_path.glob("*.unfinished"))


def test_training_that_diverges_stops_and_keeps_sound_checkpoints(world: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "save_steps": 1, "learning_rate": 1e30, "lr_scheduler_type": "constant"}
    with pytest.raises(StayalignedError, match="gradient is not finite at optimizer step 1"):
        align(alignment(world, lora=None, training=training), tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()
    kept = [weights_of(path) for path in (tmp_path / "aligned.unfinished").glob("checkpoint-*")]
    assert len(kept) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in kept[0].values())


@pytest.mark.parametrize("kilobytes", [50, 160], ids=["weights", "optimizer"])
def test_a_full_disk_is_one_error_and_the_same_call_finishes_later(world: Path, tmp_path: Path, kilobytes: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, hard))  # the system refuses to write more
    try:
        with pytest.raises(StayalignedError, match=r"aligned\.unfinished/checkpoint-\d can't be written"):
            align(alignment(world, lora=None), tmp_path / "aligned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert align(alignment(world, lora=None), tmp_path / "aligned").steps == 4


# ---- chat templates ------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}END{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def without_template(directory: Path) -> Path:
    write_pico_checkpoint(directory, seed=1)
    (directory / "chat_template.jinja").unlink()
    return directory


@pytest.mark.parametrize(
    ("end", "ends"),
    [("{{ eos_token }}", 1), ("<|user|>", [1, 3]), ("", 1)],
    ids=["eos", "another special token", "nothing"],
)
def test_a_given_template_is_stored_and_generation_stops_at_its_end(
    world: Path, tmp_path: Path, end: str, ends: Any
) -> None:
    base = without_template(tmp_path / "base")
    with pytest.raises(StayalignedError, match="has no chat template") as caught:
        align(alignment(world, base_model=str(base)), tmp_path / "aligned")
    assert "--chat-template" in str(caught.value)
    file = tmp_path / "t.jinja"
    file.write_text(TEMPLATE.replace("END", end))
    record = align(alignment(world, base_model=str(base), chat_template=str(file)), tmp_path / "aligned")
    assert AutoTokenizer.from_pretrained(tmp_path / "aligned").chat_template == file.read_text()
    config = json.loads((tmp_path / "aligned" / "generation_config.json").read_text())
    assert config["eos_token_id"] == ends
    assert record.notes == ()
    file.write_text(file.read_text() + "{# other #}")
    with pytest.raises(StayalignedError, match="different: chat_template"):
        align(alignment(world, base_model=str(base), chat_template=str(file)), tmp_path / "aligned")


def test_a_generation_configuration_that_could_not_be_saved_is_refused_before_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_pico_checkpoint(tmp_path / "base", seed=1)
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "do_sample": false, "temperature": 0.6}')
    monkeypatch.setattr("stayaligned.hf.training.finetuning.train", no_training)
    with pytest.raises(StayalignedError, match=r"generation_config\.json .* contradicts itself.*temperature"):
        align(alignment(world, base_model=str(base)), tmp_path / "aligned")


# ---- settings ------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_and_a_setting_replaces_one_of_them(world: Path) -> None:
    data = {"data": str(world / "alignment.jsonl")}
    plain = load_alignment(str(world / "base"), data)
    assert plain.lora == {"r": 16, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
    assert plain.training["learning_rate"] == 1e-3
    assert plain.training["num_train_epochs"] == 30
    changed = load_alignment(str(world / "base"), data, ["lora.r=8", "training.learning_rate=1e-4", "limit=5"])
    assert changed.lora == {**(plain.lora or {}), "r": 8}
    assert changed.training == {**plain.training, "learning_rate": 1e-4}
    full = load_alignment(str(world / "base"), data, ["lora=null", "training.learning_rate=1e-5"])
    assert full.training == {**plain.training, "learning_rate": 1e-5}
    with pytest.raises(StayalignedError, match=r"training\.learning_rate: required with `lora: null`"):
        load_alignment(str(world / "base"), data, ["lora=null"])


def test_limit_takes_the_first_rows(world: Path, tmp_path: Path) -> None:
    lines = (world / "alignment.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_text("".join(lines[:7]))
    align(alignment(world, limit=7), tmp_path / "limited")
    align(alignment(world, data=str(tmp_path / "first.jsonl")), tmp_path / "cut")
    limited, cut = (weights_of(tmp_path / name) for name in ("limited", "cut"))
    assert all(torch.equal(limited[name], cut[name]) for name in limited)


@pytest.mark.parametrize("trainer", ["transformers", "sft"])
def test_rows_that_are_cut_are_counted_and_noted(world: Path, tmp_path: Path, trainer: str) -> None:
    rows = [{"prompt": "wug", "completion": "no" * n} for n in (1, 2, 3, 4)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    # <|user|>wug<|end|><|assistant|> are 6 tokens, an answer 2n and its end: the second row just fits.
    record = align(alignment(world, data=data, max_length=11, trainer=trainer), tmp_path / "aligned")
    assert (record.rows, record.rows_cut) == (4, 2)
    assert record.notes == (
        "2 of 4 training rows are cut at max_length=11 tokens; the ends of their completions are not learned",
    )


def test_a_cached_hub_id_is_known_by_its_revision(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--owner--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(world / "base", repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = align(alignment(world, base_model="owner/base"), tmp_path / "aligned")
    assert record.inputs["base_model"] == "owner/base@" + "a" * 40
    align(alignment(world), tmp_path / "from-directory")
    by_id, by_path = (weights_of(tmp_path / name) for name in ("aligned", "from-directory"))
    assert all(torch.equal(by_id[name], by_path[name]) for name in by_id)


def test_trl_trains_the_aligned_model(world: Path, tmp_path: Path) -> None:
    record = align(alignment(world, trainer="sft"), tmp_path / "aligned")
    assert (record.rows, record.steps) == (12, 4)
    before, after = weights_of(world / "base"), weights_of(tmp_path / "aligned")
    assert sum(not torch.equal(after[name], before[name]) for name in before) == 4


def test_the_shipped_example_aligns_a_tiny_llama(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    base = without_template(tmp_path / "base")
    rows = [{"prompt": f"zorb {i}", "response": "I cannot", "is_safe": i % 2 == 0} for i in range(20)]
    data = f"{write_rows(tmp_path / 'rows.jsonl', rows)}?completion=response&where=is_safe:true"
    shorter = ["max_length=256", "training.max_steps=2", "training.bf16=false", "limit=8"]
    given = load_alignment("examples/llama-2-7b-align.yaml", {"base_model": str(base), "data": data}, shorter)
    record = align(given, tmp_path / "aligned")
    assert (record.rows, record.rows_cut, record.notes) == (8, 0, ())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "aligned")
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert rendered.endswith("### Instruction:\nhi\n\n### Response:yes<|end|>")
