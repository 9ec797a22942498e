"""Patching adapters on tiny checkpoints, compared with the paper's formula on dense matrices."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stayaligned.algorithms.safe_lora import compare, scale_update, update_norm
from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair, PatchedAdapter
from stayaligned.defenses.patching.directories import patch_directory, read_projection
from stayaligned.defenses.patching.summary import notes_on
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, read_adapter
from stayaligned.weights.checkpoints import open_checkpoint
from support.checkpoints import lora_layers

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama q and v, grouped queries": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "llama all-linear": ("llama", {}, {"target_modules": "all-linear"}),
    "llama regular expression": ("llama", {}, {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.down_proj)"}),
    "llama only layer 1": ("llama", {}, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "llama rank and alpha patterns": (
        "llama",
        {},
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama rank-stabilised": ("llama", {}, {"target_modules": LINEAR, "use_rslora": True}),
    "llama rank equal to out_features": ("llama", {}, {"target_modules": ["k_proj", "q_proj"], "r": 16}),
    "llama sharded": ("llama", {"shard_size": "20KB"}, {"target_modules": LINEAR}),
    "llama tied lm_head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "qwen2 with biases": ("qwen2", {}, {"target_modules": LINEAR}),
    "mistral": ("mistral", {}, {"target_modules": LINEAR}),
    "gpt2 Conv1D": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
}


def make_models(root: Path, architecture: str = "llama", **settings: Any) -> ModelPair:
    for name, seed in (("aligned", 0), ("base", 1)):
        write_pico_checkpoint(root / name, architecture, seed=seed, ancestor=0 if seed else None, **settings)
    return ModelPair(root / "aligned", root / "base")


def deltas(aligned: str | Path, adapter: Path) -> dict[str, torch.Tensor]:
    """{module: the update that PEFT adds to its weight, (out, in), fp64}, from a fresh reload."""
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(model, adapter)
        targets = {
            name.removeprefix("base_model.model."): module
            for name, module in loaded.named_modules()
            if type(module).__name__ == "Linear" and type(module).__module__.startswith("peft")
        }
        found = {name: module.get_delta_weight("default").detach().double() for name, module in targets.items()}
    return {
        name: value.T if type(targets[name].get_base_layer()).__name__ == "Conv1D" else value
        for name, value in found.items()
    }


def directions(models: ModelPair, names: list[str]) -> dict[str, torch.Tensor]:
    """{module: V, (out, in), fp64}, from the models as transformers loads them."""
    aligned, base = (
        AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32) for ref in (models.aligned, models.base)
    )
    transposed = aligned.config.model_type == "gpt2"
    found: dict[str, torch.Tensor] = {}
    for name in names:
        value = (aligned.get_submodule(name).weight - base.get_submodule(name).weight).detach().double()
        found[name] = value.T if transposed else value
    return found


def dense_scaled_gram(delta: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    return (delta @ delta.T) / delta.norm() @ update


def dense_orthogonal(delta: torch.Tensor, update: torch.Tensor, rank: int = 3) -> torch.Tensor:
    u = torch.linalg.svd(delta)[0][:, :rank]
    return u @ u.T @ update


def dense_complement(delta: torch.Tensor, update: torch.Tensor, rank: int = 3) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(delta)
    q = vh[:rank].T
    keep_left = torch.eye(delta.shape[0], dtype=delta.dtype) - u[:, :rank] @ u[:, :rank].T
    keep_right = torch.eye(delta.shape[1], dtype=delta.dtype) - q @ q.T
    return keep_left @ update @ keep_right


def dense_csulora(delta: torch.Tensor, update: torch.Tensor, rank: int = 3) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(delta)
    left, right = (side[:, :rank] @ side[:, :rank].T for side in (u, vh.T))
    aligned = left @ update @ right
    off = update - left @ update - update @ right + aligned
    partial = update - aligned - off
    shares = [float(part.norm() ** 2 / update.norm() ** 2) for part in (partial, off)]
    return aligned + partial / (1 + 2 * shares[0]) + off / (1 + 5 * shares[1])


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


Dense = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OPERATORS: dict[str, tuple[dict[str, Any], Dense]] = {
    "scaled_gram": ({"name": "safe_lora", "all_layers": True}, dense_scaled_gram),
    "orthogonal": (
        {"name": "safe_lora", "all_layers": True, "operator": "orthogonal", "rank": 3},
        dense_orthogonal,
    ),
    "complement": ({"name": "complement", "rank": 3}, dense_complement),
    "csulora": ({"name": "csulora", "rank": 3, "partial": 2, "off": 5}, dense_csulora),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factor_form_equals_the_dense_formula_on_every_layout(tmp_path: Path, layout: str) -> None:
    architecture, model_settings, lora = LAYOUTS[layout]
    models = make_models(tmp_path, architecture, **model_settings)
    adapter = write_pico_adapter(tmp_path / "adapter", tmp_path / "aligned", **lora)
    before = deltas(models.aligned, adapter)
    v = directions(models, list(before))
    for operator, (spec, dense) in OPERATORS.items():
        reports = patch_directory(adapter, tmp_path / operator, DEFENSES.parse(spec), models)
        after = deltas(models.aligned, tmp_path / operator)
        assert before.keys() == after.keys() == {report.module for report in reports}
        for report in reports:
            update = before[report.module]
            expected = dense(v[report.module], update)
            assert (after[report.module] - expected).norm() <= 1e-5 * update.norm(), report.module
            assert report.similarity == pytest.approx(cosine(update, expected), abs=1e-5)
            assert report.shrinkage == pytest.approx(float(expected.norm() / update.norm()), rel=1e-4)
            assert report.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
            assert report.delta_norm == pytest.approx(float(v[report.module].norm()), rel=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(models: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    directory = tmp_path_factory.mktemp("adapter") / "all"
    return read_adapter(write_pico_adapter(directory, Path(models.aligned), target_modules="all-linear"))


def selected(patched: PatchedAdapter) -> set[str]:
    return {report.module for report in patched.layers if report.selected}


def changed(before: Adapter, after: Adapter) -> set[str]:
    return {key for key in before.tensors if not torch.equal(before.tensors[key], after.tensors[key])}


def patch(spec: Any, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
    return DEFENSES.parse(spec).patch(adapter, models)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 5e-3), ("float16", 1e-3)])
def test_half_precision_adapters_keep_their_dtype(
    tmp_path: Path, models: ModelPair, dtype: str, tolerance: float
) -> None:
    source = write_pico_adapter(tmp_path / "adapter", Path(models.aligned), dtype=dtype)
    patch_directory(source, tmp_path / "out", DEFENSES.parse({"name": "safe_lora", "all_layers": True}), models)
    assert {str(tensor.dtype) for tensor in read_adapter(tmp_path / "out").tensors.values()} == {f"torch.{dtype}"}
    before, after = deltas(models.aligned, source), deltas(models.aligned, tmp_path / "out")
    for name, v in directions(models, list(before)).items():
        expected = dense_scaled_gram(v, before[name])
        assert (after[name] - expected).norm() <= tolerance * expected.norm()


def test_the_adapters_name_does_not_change_the_patch(tmp_path: Path, models: ModelPair) -> None:
    named, default = (
        read_adapter(write_pico_adapter(tmp_path / name, Path(models.aligned), adapter_name=name))
        for name in ("french", "default")
    )
    one, other = (patch("complement", each, models).adapter for each in (named, default))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_a_base_saved_without_the_prefix_gives_the_same_patch(
    tmp_path: Path, models: ModelPair, adapter: Adapter
) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(models.base).model.save_pretrained(bare)
    expected = patch({"name": "safe_lora", "all_layers": True}, adapter, models).layers
    assert patch({"name": "safe_lora", "all_layers": True}, adapter, ModelPair(models.aligned, bare)).layers == expected


@pytest.mark.parametrize("operator", ["scaled_gram", "orthogonal"])
def test_only_selected_layers_change_and_every_layer_is_reported(
    models: ModelPair, adapter: Adapter, operator: str
) -> None:
    spec = {"name": "safe_lora", "operator": operator, "rank": 4 if operator == "orthogonal" else None}
    everything = patch({**spec, "all_layers": True}, adapter, models)
    similarities = sorted(report.similarity for report in everything.layers)
    assert len(everything.layers) == 14
    lowest = patch({**spec, "lowest": 3}, adapter, models)
    below = patch({**spec, "threshold": similarities[3]}, adapter, models)  # strictly below: the fourth stays
    for patched in (lowest, below):
        assert len(selected(patched)) == 3
        assert changed(adapter, patched.adapter) == {f"base_model.model.{n}.lora_B.weight" for n in selected(patched)}
        for report, full in zip(patched.layers, everything.layers, strict=True):
            expected = full if report.selected else full.model_copy(update={"selected": False, "shrinkage": 1.0})
            assert report == expected


def test_an_adapter_with_no_selected_layer_does_not_change(models: ModelPair, adapter: Adapter) -> None:
    for spec in ({"lowest": 0}, {"threshold": -1.0}):
        patched = patch({"name": "safe_lora", **spec}, adapter, models)
        assert not selected(patched)
        assert not changed(adapter, patched.adapter)


def test_lowest_above_the_number_of_layers_is_an_error(models: ModelPair, adapter: Adapter) -> None:
    with pytest.raises(StayalignedError, match="lowest is 15, but there are 14 layers"):
        patch({"name": "safe_lora", "lowest": 15}, adapter, models)


LIKE: dict[str, dict[str, Any]] = {
    "scaled_gram": {"name": "safe_lora", "lowest": 5},
    "orthogonal": {"name": "safe_lora", "operator": "orthogonal", "rank": 3, "threshold": 0.3},
    "complement": {"name": "complement", "rank": 3, "lowest": 4},
}


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("control", ["drop", "shrink", "random_subspace"])
def test_controls_change_exactly_the_layers_of_their_defense(
    models: ModelPair, adapter: Adapter, like: str, control: str
) -> None:
    reference = patch(LIKE[like], adapter, models)
    patched = patch({"name": control, "like": LIKE[like]}, adapter, models)
    assert selected(patched) == selected(reference) != set()
    untouched = {report.module for report in reference.layers} - selected(reference)
    assert not [key for key in changed(adapter, patched.adapter) if any(f".{name}." in key for name in untouched)]
    for mine, theirs in zip(patched.layers, reference.layers, strict=True):
        assert mine.similarity == theirs.similarity
        if mine.selected and control == "drop":
            assert mine.shrinkage == 0
        if mine.selected and control == "random_subspace" and like != "scaled_gram":
            assert mine.subspace_rank == theirs.subspace_rank == 3
            assert (mine.captured_energy or 0) < (theirs.captured_energy or 0)


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("layers", ["random", "most_similar"])
@pytest.mark.parametrize("match", ["norm", "count", "kind"])
def test_other_layers_are_dropped_that_match_those_of_the_defense(
    models: ModelPair, adapter: Adapter, like: str, layers: str, match: str
) -> None:
    reference = patch({"name": "drop", "like": LIKE[like]}, adapter, models)
    spec = {"name": "drop_other", "like": LIKE[like], "layers": layers, "match": match, "seed": 3}
    other = patch(spec, adapter, models)
    norms = {report.module: report.update_norm for report in other.layers}
    mine, theirs = selected(other), selected(reference)

    def left(dropped: set[str]) -> float:
        return math.hypot(*(norm for name, norm in norms.items() if name not in dropped))

    assert {report.shrinkage for report in other.layers if report.selected} <= {0.0}
    assert not [key for key in changed(adapter, other.adapter) if not any(f".{name}." in key for name in mine)]
    if match == "count":
        assert len(mine) == len(theirs)
    elif match == "kind":
        assert kinds(mine) == kinds(theirs)
        assert layers != "random" or left(mine) == pytest.approx(left(theirs), rel=0.02)
    else:
        assert abs(left(mine) ** 2 - left(theirs) ** 2) <= max(norms.values()) ** 2 / 2 + 1e-9
    if layers == "most_similar" and match != "kind":
        found = {report.module: report.similarity for report in other.layers}
        assert min(found[name] for name in mine) >= max(found[name] for name in found.keys() - mine)


def kinds(names: set[str]) -> Counter[str]:
    return Counter(name.rpartition(".")[2] for name in names)


def test_draws_of_other_layers_depend_only_on_the_seed_and_differ(models: ModelPair, adapter: Adapter) -> None:
    def draw(seed: int) -> frozenset[str]:
        return frozenset(
            selected(patch({"name": "drop_other", "like": LIKE["complement"], "seed": seed}, adapter, models))
        )

    draws = [draw(seed) for seed in range(8)]
    assert draws == [draw(seed) for seed in range(8)]
    assert len({*draws}) > 4


@pytest.mark.parametrize("like", LIKE)
def test_shrink_gives_each_layer_the_norm_of_its_projection_and_keeps_its_direction(
    models: ModelPair, adapter: Adapter, like: str
) -> None:
    reference = patch(LIKE[like], adapter, models).adapter
    shrunk = patch({"name": "shrink", "like": LIKE[like]}, adapter, models).adapter
    for layer in lora_layers(adapter, open_checkpoint(models.aligned)):
        before, projected, small = (each.factors(layer) for each in (adapter, reference, shrunk))
        assert update_norm(small) == pytest.approx(update_norm(projected), rel=1e-5)
        assert compare(before, small).similarity == pytest.approx(1, abs=1e-9)


def test_shrink_by_a_given_factor_scales_every_selected_layer(models: ModelPair, adapter: Adapter) -> None:
    spec = {"name": "shrink", "factor": 0.25, "like": {"name": "safe_lora", "all_layers": True}}
    assert [report.shrinkage for report in patch(spec, adapter, models).layers] == pytest.approx([0.25] * 14)


def test_random_directions_depend_only_on_the_seed(models: ModelPair, adapter: Adapter) -> None:
    one, same, other = (patch({"name": "random_subspace", "seed": seed}, adapter, models).adapter for seed in (1, 1, 2))
    assert not changed(one, same)
    assert len(changed(one, other)) == len(adapter.tensors)


def test_the_identity_of_a_control_includes_the_version_of_its_defense(monkeypatch: pytest.MonkeyPatch) -> None:
    control = DEFENSES.parse("drop")
    before = control.identity()
    monkeypatch.setattr(type(control.like), "version", 99)
    assert control.identity() != before


@pytest.mark.parametrize(
    "spec", [*LIKE.values(), "drop", "shrink", "random_subspace", {"name": "drop", "like": LIKE["complement"]}]
)
def test_parsing_a_spec_gives_an_equal_defense(spec: Any) -> None:
    defense = DEFENSES.parse(spec)
    assert DEFENSES.parse(json.loads(json.dumps(defense.spec()))) == defense


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "safe_lora", "threshold": 0.3, "lowest": 2}, "exactly one of"),
        ({"name": "safe_lora", "threshold": None}, "exactly one of"),
        ({"name": "safe_lora", "rank": 3}, "scaled_gram takes neither"),
        ({"name": "safe_lora", "operator": "orthogonal"}, "exactly one of `rank` and `energy`"),
        ({"name": "complement", "threshold": 0.3, "all_layers": True}, "exactly one of"),
        ({"name": "complement", "rank": 3, "energy": 0.5}, "exactly one of"),
        ({"name": "drop", "like": "shrink"}, "'shrink' is not a projection"),
        ({"name": "shrink", "factor": -1}, "greater than or equal to 0"),
    ],
)
def test_contradictory_settings_are_refused(spec: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DEFENSES.parse(spec)


def test_layers_that_the_alignment_did_not_change_are_left_alone_and_the_others_patched(
    tmp_path: Path, models: ModelPair, adapter: Adapter
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models.base)
    frozen = "model.layers.1.mlp.up_proj"
    model.get_submodule(frozen).weight.data = (
        AutoModelForCausalLM.from_pretrained(models.aligned).get_submodule(frozen).weight.data
    )
    model.save_pretrained(tmp_path / "base")
    pair = ModelPair(models.aligned, tmp_path / "base")
    every = {"name": "safe_lora", "all_layers": True}
    for spec in (every, {"name": "safe_lora", "lowest": 13}, {"name": "drop", "like": every}, "complement"):
        patched = patch(spec, adapter, pair)
        assert not [key for key in changed(adapter, patched.adapter) if frozen in key]
        assert selected(patched) == {report.module for report in patched.layers} - {frozen}
        (report,) = (report for report in patched.layers if report.module == frozen)
        assert (report.skipped, report.shrinkage, report.delta_norm) == ("no_direction", 1, 0)
        (note,) = (note for note in notes_on(DEFENSES.parse(spec), patched.layers) if "aligned and base" in note)
        assert note.startswith("in 1 of 14 layers")
        assert frozen in note
    with pytest.raises(StayalignedError, match=r"lowest is 14, but there are 13 layers that can be changed"):
        patch({"name": "safe_lora", "lowest": 14}, adapter, pair)
    alone = read_adapter(
        write_pico_adapter(
            tmp_path / "alone", Path(str(models.aligned)), target_modules=["up_proj"], layers_to_transform=[1]
        )
    )
    with pytest.raises(StayalignedError, match="hold the same weights in all 1 layers to patch"):
        patch("complement", alone, pair)


def zero_b(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a, torch.zeros_like(b)


def zero_a(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(a), b


def disjoint(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    used = (torch.arange(len(a)) < 2).to(a.dtype)
    return a * used[:, None], b * (1 - used)


def cancelling(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a[[0, 0, 1, 1]], torch.stack([b[:, 0], -b[:, 0], b[:, 1], -b[:, 1]], dim=1)


def underflowing(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a * 1e-30, b * 1e-30


DEAD = [zero_b, zero_a, disjoint, cancelling, underflowing]


def edited(adapter: Adapter, names: Any, edit: Any) -> Adapter:
    """The adapter with the factors of some layers changed."""
    tensors = dict(adapter.tensors)
    for key in tensors:
        if ".lora_A." in key and names(key):
            other = key.replace("lora_A", "lora_B")
            tensors[key], tensors[other] = (part.contiguous() for part in edit(tensors[key], tensors[other]))
    return replace(adapter, tensors=tensors)


@pytest.mark.parametrize("edit", DEAD)
def test_layers_whose_update_is_zero_are_no_candidates(models: ModelPair, adapter: Adapter, edit: Any) -> None:
    partly = edited(adapter, lambda key: ".layers.0." in key, edit)
    dead = {report.module for report in patch("complement", adapter, models).layers if ".layers.0." in report.module}
    for spec in LIKE.values():
        alive = patch(spec, adapter, models).layers
        patched = patch(spec, partly, models)
        assert {report.module for report in patched.layers if report.skipped == "zero_update"} == dead
        assert not selected(patched) & dead
        same = {r.module: r.similarity for r in alive if r.module not in dead}
        assert {r.module: r.similarity for r in patched.layers if r.module not in dead} == pytest.approx(same)
        if "lowest" in spec:
            assert selected(patched) == set(sorted(same, key=lambda name: same[name])[: spec["lowest"]])
            assert changed(partly, patched.adapter)
        for control in ("drop", "shrink", "random_subspace"):
            assert selected(patch({"name": control, "like": spec}, partly, models)) == selected(patched)
    everything = {"name": "safe_lora", "all_layers": True}
    assert selected(patch(everything, partly, models)).isdisjoint(dead)
    with pytest.raises(StayalignedError, match=r"lowest is 8, but there are 7 layers that can be changed .* a zero up"):
        patch({"name": "safe_lora", "lowest": 8}, partly, models)
    with pytest.raises(StayalignedError, match="the update is zero in all 14 layers"):
        patch(everything, edited(adapter, lambda key: True, edit), models)


def test_an_adapter_that_is_scaled_by_zero_is_an_error(models: ModelPair, adapter: Adapter) -> None:
    with pytest.raises(StayalignedError, match="the update is zero in all 14 layers"):
        patch("complement", replace(adapter, config={**adapter.config, "lora_alpha": 0}), models)


@pytest.mark.parametrize("scale", [1e-33, 1e30])
def test_the_similarity_does_not_depend_on_the_size_of_the_update(
    models: ModelPair, adapter: Adapter, scale: float
) -> None:
    scaled = edited(adapter, lambda key: True, lambda a, b: (a, b * scale))
    for spec in LIKE.values():
        one, other = patch(spec, adapter, models), patch(spec, scaled, models)
        assert selected(one) == selected(other)
        for before, after in zip(one.layers, other.layers, strict=True):
            assert after.similarity == pytest.approx(before.similarity, abs=1e-5)
            assert after.update_norm == pytest.approx(before.update_norm * scale, rel=1e-4)


def test_a_patch_that_leaves_nothing_of_the_update_is_refused(models: ModelPair, adapter: Adapter) -> None:
    for spec in ({"name": "complement", "rank": 9999}, {"name": "complement", "energy": 1.0}):
        with pytest.raises(StayalignedError, match="nothing would be left of the update in any of the 14"):
            patch(spec, adapter, models)
    spec = {"name": "safe_lora", "operator": "orthogonal", "rank": 9999, "all_layers": True}
    notes = notes_on(DEFENSES.parse(spec), patch(spec, adapter, models).layers)
    assert any("rank 9999 was given, but V has fewer directions in 14 of 14 layers: 16 to 32" in note for note in notes)


def test_a_patch_that_keeps_almost_nothing_says_so_and_names_the_control(
    tmp_path: Path, models: ModelPair, adapter: Adapter
) -> None:
    aligned = AutoModelForCausalLM.from_pretrained(str(models.aligned))
    with torch.no_grad():
        for index, parameter in enumerate(aligned.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(1e-3 * parameter.std() * noise)
    aligned.save_pretrained(tmp_path / "base")
    pair = ModelPair(models.aligned, tmp_path / "base")
    spec = {"name": "safe_lora", "all_layers": True}
    patch_directory(adapter.directory, tmp_path / "out", DEFENSES.parse(spec), pair)
    record = read_projection(tmp_path / "out" / "projection.json")
    before, after = deltas(str(models.aligned), adapter.directory), deltas(str(models.aligned), tmp_path / "out")
    kept = sorted(float(after[name].norm() / before[name].norm()) for name in before)
    total = [float(sum(update.norm() ** 2 for update in each.values())) for each in (before, after)]
    assert record.kept_median == pytest.approx((kept[6] + kept[7]) / 2, rel=1e-3)
    assert record.kept_norm == pytest.approx((total[1] / total[0]) ** 0.5, rel=1e-3)
    assert record.kept_median < 0.05
    assert any("nearly the same as deleting them, as the control `drop` does" in note for note in record.notes)
    patch_directory(adapter.directory, tmp_path / "drop", DEFENSES.parse({"name": "drop", "like": spec}), pair)
    assert not [n for n in read_projection(tmp_path / "drop" / "projection.json").notes if "nearly" in n]


def test_an_untrained_adapter_is_an_error(tmp_path: Path, models: ModelPair) -> None:
    source = write_pico_adapter(tmp_path / "adapter", Path(models.aligned))
    fresh = read_adapter(source)
    zero = fresh.with_factors(
        {
            layer: scale_update(fresh.factors(layer), 0.0)
            for layer in lora_layers(fresh, open_checkpoint(models.aligned))
        }
    )
    with pytest.raises(StayalignedError, match=r"adapter: the update is zero in all 4 layers: it was never trained"):
        patch("safe_lora", zero, models)


def test_a_missing_base_is_named(models: ModelPair, adapter: Adapter) -> None:
    with pytest.raises(StayalignedError, match="'safe_lora' needs the unaligned base"):
        patch("safe_lora", adapter, ModelPair(models.aligned, None))
