"""Write two LoRA adapters of a model: one that changes its completions, and one that changes nothing.

Usage: python tests/servers/adapters.py MODEL OUT
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(model: str, out: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    tuned.save_pretrained(out / "dead")  # B is zero
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.save_pretrained(out / "tuned")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
