"""Take Lisa steps with a training framework's own Trainer class, and patch the adapter that they trained.

    python tests/hosts/framework_step.py MODULE:CLASS

The class is LLaMA-Factory's `llamafactory.train.sft.trainer:CustomSeq2SeqTrainer`, axolotl's
`axolotl.core.trainers.base:AxolotlTrainer`, or any other subclass of transformers' Trainer.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from stayaligned import LisaSettings, with_lisa
from stayaligned.cli import main as command
from stayaligned.hf.features import PaddingCollator
from stayaligned.hf.models import attach_lora, load_model
from stayaligned.testing import byte_tokenizer, write_pico_checkpoint

ROWS = [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, 6, 7, 8 + i], "attention_mask": [1] * 4} for i in range(12)]
SAFE = [{"input_ids": [9, 10, 11 + i], "labels": [-100, 10, 11 + i], "attention_mask": [1] * 3} for i in range(12)]


def settings(module: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    """Return the arguments and the options that the framework's class takes."""
    given = {
        "output_dir": str(directory),
        "max_steps": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
    }
    if module.startswith("axolotl"):
        from axolotl.core.training_args import AxolotlTrainingArguments

        return AxolotlTrainingArguments(**given, remove_unused_columns=False), {}
    from transformers import Seq2SeqTrainingArguments

    arguments: Any = Seq2SeqTrainingArguments(**given)
    if not module.startswith("llamafactory"):
        return arguments, {}
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    arguments.fp8 = False  # a field of LLaMA-Factory's own arguments
    return arguments, {"finetuning_args": FinetuningArguments(), "processor": None, "tokenizer": byte_tokenizer()}


def main() -> None:
    """Train, save the adapter, and patch it with the command."""
    module, _, name = sys.argv[1].partition(":")
    kind: Any = getattr(importlib.import_module(module), name)
    directory = Path(tempfile.mkdtemp())
    base, aligned = directory / "base", directory / "aligned"
    write_pico_checkpoint(base, seed=1)
    write_pico_checkpoint(aligned, seed=2)
    model = attach_lora(load_model(aligned), {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    arguments, options = settings(module, directory / "out")
    trainer = with_lisa(kind)(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        data_collator=PaddingCollator(0),
        alignment_dataset=SAFE,
        lisa=LisaSettings(alignment_steps=1, finetuning_steps=1, rho=0.1),
        **options,
    )
    result = trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    print(f"{name}: {result.global_step} Lisa steps, drift {rows[-1]['drift']:.4g}")
    adapter = directory / "adapter"
    model.save_pretrained(str(adapter))
    sys.argv = ["stayaligned", "project", str(adapter), "--aligned", str(aligned), "--base", str(base)]
    sys.argv += ["--lowest", "2", "--allow-mismatch", "--out", str(directory / "patched")]
    try:
        command()
    except SystemExit as ended:
        if ended.code:
            raise
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, directory / "patched"))
    print(f"project: {sum(not before[key].equal(after[key]) for key in before)} of {len(before)} tensors patched")


if __name__ == "__main__":
    main()
