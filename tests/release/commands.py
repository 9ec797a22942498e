"""Run the installed command in the current directory: `python commands.py core`, then `python commands.py report`.

Runs outside the checkout, with the interpreter of an environment that holds the wheel and nothing of the tests.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))  # for `support`, which imports the installed package alone
from support.runs import evidence, outcomes, write_run

COMMAND = Path(sys.executable).with_name("stayaligned")
MODULE = "model.layers.0.self_attn.q_proj"


def run(*arguments: object, code: int = 0, says: str = "") -> None:
    began = time.monotonic()
    home = {"HOME": "/nonexistent"}  # no command of the core needs a home
    ended = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, env={**os.environ, **home}
    )
    shown = ended.stdout + ended.stderr
    assert ended.returncode == code, f"{arguments}: exit code {ended.returncode}\n{shown}"
    assert says in shown and "Traceback" not in shown, f"{arguments}:\n{shown}"
    print(f"        {time.monotonic() - began:4.1f} s  stayaligned {arguments[0]}")


def write_models() -> None:
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    config = {"model_type": "llama", "hidden_size": 64, "architectures": ["LlamaForCausalLM"]}
    for role, weight in (("base", base), ("chat", base + 0.1 * torch.randn(64, 64))):
        Path(role).mkdir()
        Path(role, "config.json").write_text(json.dumps(config))
        save_file({f"{MODULE}.weight": weight}, Path(role, "model.safetensors"), metadata={"format": "pt"})
    Path("adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    Path("adapter", "adapter_config.json").write_text(json.dumps(settings))
    factors = {"A": torch.randn(2, 64), "B": torch.randn(64, 2)}
    tensors = {f"base_model.model.{MODULE}.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(tensors, Path("adapter", "adapter_model.safetensors"), metadata={"format": "pt"})


def check_core() -> None:
    write_models()
    for name, harmful in (("before", 8), ("same", 8), ("after", 90)):
        write_run(Path(name), evidence({"keyword": outcomes(400, harmful)}, task=[1.0, 0.5] * 20), arm=name)
    run("--help", says="Patch finished fine-tunes")
    run("--version", says="stayaligned ")
    run("list", says="safe_lora")
    run("show", "defense", "lisa", says="alignment_steps")
    models = ("--aligned", "chat", "--base", "base")
    run("project", "adapter", *models, "--out", "adapter-safe", "--threshold", "0.35")
    assert Path("adapter-safe", "adapter_model.safetensors").is_file()
    run("gate", "--baseline", "before", "--candidate", "same", "--max-harm-increase", "5%", says="PASS")
    run("gate", "--baseline", "before", "--candidate", "after", "--max-harm-increase", "5%", code=1, says="FAIL")
    run("power", "--rate", "5%", "--prompts", "200")
    missing = "pip install 'stayaligned[report]'"
    run("report", "before", "after", "--out", "report", code=2, says=missing)
    run("project", "adapter", *models, "--scan", "--out", "scan", code=2, says=missing)
    run("evaluate", "chat", "--harmful-prompts", "p.jsonl", "--out", "out", code=2, says="p.jsonl")
    Path("p.jsonl").write_text('{"prompt": "zorb?"}\n')
    missing = "pip install 'stayaligned[models,report]'"
    run("evaluate", "chat", "--harmful-prompts", "p.jsonl", "--out", "out", code=2, says=missing)
    run("demo", "--out", "out", code=2, says=missing)
    run("project", "adapter", "--aligned", "zorb/quib", "--base", "base", "--threshold", "0.3", "--out", "x", code=2,
        says="offline, run `hf download` beforehand")  # fmt: skip
    assert not [name for name in ("report", "scan", "out", "x") if Path(name).exists()]


def check_report() -> None:
    run("report", "before", "after", "--out", "report", says="report.html")
    assert Path("report", "report.html").is_file()
    run("project", "adapter", "--aligned", "chat", "--base", "base", "--scan", "--out", "scan")


if __name__ == "__main__":
    {"core": check_core, "report": check_report}[sys.argv[1]]()
