"""Lisa across processes: killed at any moment and resumed, and split over two, it ends in the same weights.

The processes are forks of one that has imported torch, so that the whole takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, os, random, signal, socket, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
import transformers.utils.logging
from stayaligned import Lisa, attach_lisa
from stayaligned.hf.features import PaddingCollator
from stayaligned.hf.finetuning import train
from stayaligned.testing import pico_model

transformers.utils.logging.set_verbosity_error()
work, steps = Path(sys.argv[1]), 16


def rows(first, count):
    made = [[first, *range(10 + i, 14 + 2 * i)] for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def run(name, batch=4, pause=0.0, dropout=0.1, **changes):
    torch.manual_seed(4)
    model = get_peft_model(pico_model(seed=3), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout))
    arguments = TrainingArguments(
        output_dir=str(work / name), use_cpu=True, learning_rate=1e-2, per_device_train_batch_size=batch,
        gradient_accumulation_steps=2, max_steps=steps, disable_tqdm=True, report_to="none", logging_steps=steps,
        ddp_find_unused_parameters=False, **changes,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(3, 15), data_collator=PaddingCollator(0))
    attach_lisa(trainer, alignment_dataset=rows(2, 5), lisa=Lisa(alignment_steps=2, finetuning_steps=3, rho=0.7))
    log = train(trainer, progress=lambda share: time.sleep(pause))
    if arguments.process_index == 0:
        save_file({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, work / name / "end")
        (work / name / "log.json").write_text(json.dumps(log))


def fork(function, *args, environment=None, **kwargs):
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(environment or {})
            sys.stdout = open(os.devnull, "w")
            function(*args, **kwargs)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid


def wait(pid):
    return os.waitpid(pid, 0)[1]
"""

KILLING = (
    PROGRAM
    + """
saving = {"save_strategy": "steps", "save_steps": 1, "pause": 0.01}
assert wait(fork(run, "whole", save_strategy="no")) == 0
moments, reached = random.Random(5), []
for attempt in range(40):
    pid = fork(run, "killed", **saving)
    started = time.monotonic()
    # Wait for a new checkpoint, so that every attempt gets somewhere, then strike within the next few saves.
    while len(list((work / "killed").glob("checkpoint-*"))) <= (reached[-1] if reached else 0) + 1:
        if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() - started > 30:
            break
        time.sleep(0.002)
    else:
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        reached.append(len(list((work / "killed").glob("checkpoint-*"))))
        if len(reached) < 4 and reached[-1] < steps - 2:
            continue
    break
assert wait(fork(run, "killed", **saving)) == 0
print(json.dumps(reached))
"""
)

TWO_PROCESSES = (
    PROGRAM
    + """
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
assert wait(fork(run, "one", dropout=0.0, save_strategy="no")) == 0
ranks = [
    fork(run, "two", batch=2, dropout=0.0, save_strategy="steps", save_steps=7,
         environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    for rank in range(2)
]
assert [wait(rank) for rank in ranks] == [0, 0]
"""
)


def run_program(program: str, work: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(work)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def final_weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "end")


def test_a_run_killed_again_and_again_ends_in_the_weights_of_the_run_that_was_not(tmp_path: Path) -> None:
    reached = json.loads(run_program(KILLING, tmp_path))
    print("checkpoints at each kill:", reached)
    assert len(reached) >= 2, "the kills came too late to interrupt anything"
    whole, killed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(killed[name].equal(weight) for name, weight in whole.items())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_program(TWO_PROCESSES, tmp_path)
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert max((two[name] - weight).abs().max().item() for name, weight in one.items()) < 1e-5
    logs = [json.loads((tmp_path / name / "log.json").read_text())[0] for name in ("one", "two")]
    for key in ("alignment_loss", "finetuning_loss", "drift"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4), key
    assert (tmp_path / "two" / "checkpoint-7" / "lisa_anchor.safetensors").is_file()
