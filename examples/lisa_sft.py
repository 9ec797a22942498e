"""A TRL script that keeps the model aligned, resumes after preemption, and runs on one or more GPUs.

    python examples/lisa_sft.py --model MODEL --user user.jsonl --safety safety.jsonl --out out/lisa
    torchrun --nproc-per-node 8 examples/lisa_sft.py …        (or `accelerate launch`, also with FSDP2 configured)

Run the same command again after an interruption: it continues from the last complete checkpoint.
"""

import argparse
import json

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from stayaligned import LisaSettings, with_lisa


def rows(file):
    return load_dataset("json", data_files=file, split="train")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--user", required=True, help="the user's rows, in any of TRL's formats")
    parser.add_argument("--safety", required=True, help="requests with safe completions, in any of TRL's formats")
    parser.add_argument("--out", required=True)
    parser.add_argument("--args", type=json.loads, default={}, help="more fields of SFTConfig, as JSON")
    given = parser.parse_args()
    settings = {"max_steps": 1000, "save_steps": 100, "save_total_limit": 2, "learning_rate": 1e-5, **given.args}

    trainer = with_lisa(SFTTrainer)(
        given.model,
        SFTConfig(output_dir=given.out, **settings),
        train_dataset=rows(given.user),
        alignment_dataset=rows(given.safety),
        lisa=LisaSettings(alignment_steps=10, finetuning_steps=90, rho=1.0),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


if __name__ == "__main__":
    main()
