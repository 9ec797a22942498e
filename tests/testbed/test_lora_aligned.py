import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint
from stayaligned.hf.features import PaddingCollator
from stayaligned.testbed import (
    LoraAlignment,
    Recipe,
    build,
    build_lora_aligned,
    building,
    corpora,
    recipe,
    reference_key,
    resolve,
    training,
)
from stayaligned.testbed.tokenizer import chat_tokenizer

MINIATURE_LORA = LoraAlignment(
    rank=3, alpha=12, learning_rate=2e-2, steps=8, batch_size=8, minimum_aligned_refusal=0
)  # fmt: skip


@pytest.fixture(scope="module")
def lora_aligned(directory: Path, miniature: Recipe) -> Path:
    """The directory made from the miniature testbed of seed 0."""
    return build_lora_aligned(0, recipe=miniature, lora=MINIATURE_LORA, cache=directory.parents[1])


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def _content(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): fingerprint(path) for path in directory.rglob("*") if path.is_file()
    }


def _copy_of_testbed(directory: Path, cache: Path) -> Path:
    """The finished testbed in another cache, so that a test need not build it again."""
    (cache / "testbed").mkdir(parents=True)
    place = cache / "testbed" / directory.name
    place.symlink_to(directory)
    return place


def test_each_linear_weight_differs_by_at_most_the_rank_and_nothing_else_differs(
    directory: Path, lora_aligned: Path
) -> None:
    base, aligned = _weights(directory / "base"), _weights(lora_aligned / "aligned-lora")
    assert base.keys() == aligned.keys()
    for name, before in base.items():
        after = aligned[name]
        if not name.endswith("_proj.weight"):
            assert torch.equal(after, before), name
            continue
        singular = torch.linalg.svdvals(after.double() - before.double())
        # The sum is rounded once: half a unit in the last place of each weight, all of them together.
        rounding = torch.finfo(torch.float32).eps * float(after.double().norm())
        assert len(singular) > MINIATURE_LORA.rank
        assert int((singular > rounding).sum()) == MINIATURE_LORA.rank, name


def test_the_merged_model_has_learned_the_alignment_rows(
    directory: Path, lora_aligned: Path, miniature: Recipe
) -> None:
    tokenizer = chat_tokenizer()
    rows = corpora.alignment(0, corpora.make_world(0, miniature), miniature)
    batch = PaddingCollator.of(tokenizer)(training.encode(tokenizer, rows[:200]))
    with torch.no_grad():
        base, aligned = (
            float(training.answer_loss(AutoModelForCausalLM.from_pretrained(place), batch))
            for place in (directory / "base", lora_aligned / "aligned-lora")
        )
    assert aligned < base


def test_the_checkpoint_is_one_like_the_aligned_models(directory: Path, lora_aligned: Path) -> None:
    ours, theirs = _content(lora_aligned / "aligned-lora"), _content(directory / "aligned")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(lora_aligned / "aligned-lora")
    assert model.dtype is torch.float32


@pytest.mark.parametrize("name", ["alignment", "harmful-prompts"])
def test_the_rows_that_are_read_are_those_that_were_written(name: str, directory: Path, miniature: Recipe) -> None:
    world = corpora.make_world(0, miniature)
    written = {**world.evaluation, "alignment": corpora.alignment(0, world, miniature)}[name]
    assert building._dialogues(directory / "data" / f"{name}.jsonl") == written


def test_a_seed_gives_the_same_bytes_whatever_the_global_random_state_and_leaves_the_testbed_alone(
    directory: Path, lora_aligned: Path, miniature: Recipe, tmp_path: Path
) -> None:
    _copy_of_testbed(directory, tmp_path)
    testbed = _content(directory)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = build_lora_aligned(0, recipe=miniature, lora=MINIATURE_LORA, cache=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _content(again / "aligned-lora") == _content(lora_aligned / "aligned-lora")
    assert _content(directory) == testbed


def test_another_seed_aligns_the_same_base_model_otherwise(
    directory: Path, lora_aligned: Path, miniature: Recipe, tmp_path: Path
) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        building.construct_lora_aligned(
            tmp_path / str(seed), directory, seed, miniature, MINIATURE_LORA, lambda *_: None
        )
    first, other = (_weights(tmp_path / str(seed) / "aligned-lora") for seed in (0, 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], _weights(lora_aligned / "aligned-lora")[name])
    assert not torch.equal(first[name], other[name])


def test_the_directory_describes_itself(directory: Path, lora_aligned: Path, miniature: Recipe) -> None:
    description = json.loads((lora_aligned / "testbed.json").read_text())
    assert description["key"] == lora_aligned.name == MINIATURE_LORA.key(miniature, 0)
    assert description["testbed"] == directory.name
    assert LoraAlignment.model_validate(description["lora"]) == MINIATURE_LORA
    assert set(description["gates"]) == {"aligned_refusal"}
    assert set(description["versions"]) == {"torch", "transformers", "tokenizers", "peft"}


def test_a_failed_gate_is_an_error_and_leaves_nothing_but_the_testbed(
    directory: Path, miniature: Recipe, tmp_path: Path
) -> None:
    testbed = _copy_of_testbed(directory, tmp_path)
    strict = MINIATURE_LORA.model_copy(update={"minimum_aligned_refusal": 1.01})
    with pytest.raises(StayalignedError, match=r"LoRA-aligned .* seed 0 .* aligned_refusal \d\.\d+ < 1\.01") as caught:
        build_lora_aligned(0, recipe=miniature, lora=strict, cache=tmp_path)
    assert caught.value.hint
    assert [path for path in (tmp_path / "testbed").iterdir() if path.is_dir()] == [testbed]


def test_a_testbed_that_fails_its_gates_is_never_aligned(miniature: Recipe, tmp_path: Path) -> None:
    strict = miniature.model_copy(update={"minimum_judge_accuracy": 1.01, "base_steps": 1})
    with pytest.raises(StayalignedError, match="judge_accuracy"):
        build_lora_aligned(0, recipe=strict, lora=MINIATURE_LORA, cache=tmp_path)
    assert not [path for path in (tmp_path / "testbed").iterdir() if path.is_dir()]


def test_the_key_changes_with_the_testbed_the_settings_the_behavior_and_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        Recipe().key(0),
        LoraAlignment().key(Recipe(), 0),
        LoraAlignment().key(Recipe(), 1),
        LoraAlignment().key(Recipe(alignment_rows=999), 0),
        *(LoraAlignment(**{name: 7}).key(Recipe(), 0) for name in LoraAlignment.model_fields),
    ]
    monkeypatch.setattr(recipe, "LORA_BEHAVIOR_VERSION", 10**6)
    keys.append(LoraAlignment().key(Recipe(), 0))
    versions = recipe.version
    monkeypatch.setattr(recipe, "_version", lambda name: "0" if name == "peft" else versions(name))
    keys.append(LoraAlignment().key(Recipe(), 0))
    assert len(set(keys)) == len(keys)


def test_lora_settings_do_not_change_the_testbeds_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Recipe().key(0)
    monkeypatch.setattr(recipe, "LORA_BEHAVIOR_VERSION", 10**6)
    versions = recipe.version
    monkeypatch.setattr(recipe, "_version", lambda name: "0" if name == "peft" else versions(name))
    assert Recipe().key(0) == key


def test_a_finished_lora_aligned_model_is_resolved_without_its_testbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAYALIGNED_CACHE", str(tmp_path))
    key = LoraAlignment().key(Recipe(), 4)
    (tmp_path / "testbed" / key).mkdir(parents=True)
    assert resolve("testbed:aligned-lora", 4) == tmp_path / "testbed" / key / "aligned-lora"
    assert reference_key("testbed:aligned-lora", 4) == f"testbed:{key}/aligned-lora"


def test_other_references_do_not_build_the_lora_aligned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def construct(directory: Path, *_: object) -> None:
        (directory / "testbed.json").write_text("{}")

    monkeypatch.setattr(building, "construct", construct)
    resolve("testbed:aligned", 0, cache=tmp_path)
    assert [path.name for path in (tmp_path / "testbed").iterdir() if path.is_dir()] == [Recipe().key(0)]


def test_concurrent_processes_build_the_lora_aligned_model_once(
    directory: Path, miniature: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy_of_testbed(directory, tmp_path)
    built: list[str] = []
    started = threading.Event()

    def construct(place: Path, *_: object) -> None:
        started.set()
        time.sleep(0.2)
        built.append(place.name)
        (place / "testbed.json").write_text("{}")

    monkeypatch.setattr(building, "construct_lora_aligned", construct)

    def ask() -> Path:
        return build_lora_aligned(0, recipe=miniature, lora=MINIATURE_LORA, cache=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        assert started.wait(10)
        second = pool.submit(ask)
        assert first.result() == second.result()
    assert len(built) == 1


@pytest.mark.parametrize("testbed_is_there", [True, False])
def test_progress_rises_to_one_whether_the_testbed_is_there_or_not(
    testbed_is_there: bool, directory: Path, miniature: Recipe, tmp_path: Path
) -> None:
    if testbed_is_there:
        _copy_of_testbed(directory, tmp_path)
    told: list[tuple[Any, ...]] = []
    build_lora_aligned(
        0, recipe=miniature, lora=MINIATURE_LORA, cache=tmp_path, progress=lambda *step: told.append(step)
    )
    fractions = [fraction for _, fraction, *_ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    stages = [stage for stage, *_ in told]
    assert stages[-1] == "testbed: aligned-lora"
    assert ("testbed: base" in stages) is not testbed_is_there
    assert build(0, recipe=miniature, cache=tmp_path) == tmp_path / "testbed" / directory.name


def test_no_warning_of_a_library_reaches_the_user(directory: Path, miniature: Recipe, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        building.construct_lora_aligned(tmp_path, directory, 0, miniature, MINIATURE_LORA, lambda *_: None)
    assert [str(warning.message) for warning in caught] == []


def test_the_bytes_do_not_depend_on_where_the_testbed_lies(
    directory: Path, lora_aligned: Path, miniature: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    building.construct_lora_aligned(tmp_path, Path(directory.name), 0, miniature, MINIATURE_LORA, lambda *_: None)
    assert _content(tmp_path / "aligned-lora") == _content(lora_aligned / "aligned-lora")
