"""Safe Delta on tiny checkpoints, compared with the inputs and weights that transformers has in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.algorithms.safe_delta import inverse_factor, safe_delta
from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory
from stayaligned.hf.features import encode_examples
from stayaligned.hf.models import load_tokenizer
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from support.world import write_rows

K = "model.layers.1.mlp.down_proj"


def make(root: Path, architecture: str = "llama") -> ModelPair:
    write_pico_checkpoint(root / "aligned", architecture, seed=0)
    write_pico_checkpoint(root / "tuned", architecture, seed=0)
    for shard in (root / "tuned").glob("*.safetensors"):
        save_file({k: v + 0.02 * v.sin() for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    write_rows(root / "rows.jsonl", [{"prompt": f"wug {i}", "completion": "I cannot"} for i in range(3)])
    return ModelPair(
        root / "aligned", None, alignment_examples=read_examples(str(root / "rows.jsonl"), origin="alignment")
    )


@pytest.mark.parametrize(("architecture", "name"), [("llama", K), ("gpt2", "transformer.h.1.mlp.c_proj")])
def test_a_layer_is_the_closed_form_on_the_aligned_model_s_inputs(tmp_path: Path, architecture: str, name: str) -> None:
    models, strength = make(tmp_path, architecture), 20.0
    patch = DEFENSES.parse({"name": "safe_delta", "strength": strength})
    reports = {layer.module: layer for layer in patch_directory(tmp_path / "tuned", tmp_path / "out", patch, models)}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0]))
    for row in encode_examples(load_tokenizer(tmp_path / "aligned"), models.alignment_examples, 512):
        model(input_ids=torch.tensor([row["input_ids"]]))
    hessian = 2 / 3 * sum((x.T @ x for x in seen), torch.zeros(()))
    tuned, out = (
        AutoModelForCausalLM.from_pretrained(tmp_path / place).get_parameter(f"{name}.weight").detach()
        for place in ("tuned", "out")
    )
    aligned = model.get_parameter(f"{name}.weight").detach()
    if architecture == "gpt2":
        tuned, out, aligned = tuned.T, out.T, aligned.T
    expected = safe_delta(aligned, tuned, inverse_factor(hessian), strength)
    assert (out - expected).norm() <= 1e-3 * (tuned - aligned).norm()
    share = float((out == tuned).double().mean())  # kept; the others are compensated
    assert 0.02 < share < 0.98
    report, delta = reports[name], tuned - aligned
    assert report.update_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert report.shrinkage == pytest.approx(float((out - aligned).norm() / delta.norm()), rel=1e-3)


def test_no_budget_gives_the_aligned_layers_and_everything_else_is_kept(tmp_path: Path) -> None:
    models = make(tmp_path)
    patch_directory(tmp_path / "tuned", tmp_path / "out", DEFENSES.parse({"name": "safe_delta", "strength": 0}), models)
    aligned, tuned, out = (load_file(tmp_path / place / "model.safetensors") for place in ("aligned", "tuned", "out"))
    for name, value in out.items():
        assert value.equal((aligned if "_proj" in name else tuned)[name]), name


def test_adapters_and_missing_rows_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    models = make(tmp_path)
    write_pico_adapter(tmp_path / "adapter", tmp_path / "aligned")
    patch = DEFENSES.parse("safe_delta")
    for source, pair, message in (
        (tmp_path / "adapter", models, "an adapter can't hold"),
        (tmp_path / "tuned", ModelPair(tmp_path / "aligned", None), "needs alignment data"),
    ):
        with pytest.raises(StayalignedError, match=message):
            patch_directory(source, tmp_path / "out", patch, pair)
        assert not (tmp_path / "out").exists()
