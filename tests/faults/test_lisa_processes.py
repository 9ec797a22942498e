"""Lisa in two processes, as torchrun starts them: the same as in one process, also after a kill and a resume."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from support.world import experiment, write_world


def test_two_processes_train_like_one(forks: Callable[..., Any], tmp_path: Path) -> None:
    forks("split")
    one, two = (load_file(tmp_path / name / "end") for name in ("one", "two"))
    assert max((two[name] - weight).abs().max().item() for name, weight in one.items()) < 1e-5
    logs = [json.loads((tmp_path / name / "log.json").read_text())[0] for name in ("one", "two")]
    for key in ("alignment_loss", "finetuning_loss", "drift"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4), key
    assert (tmp_path / "two" / "checkpoint-7" / "lisa_anchor.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "in_two", "anchors"),
    [
        ("full", "full, sharded", 2),
        ("lora, decoupled", "lora, decoupled, sharded", 2),
        ("full, watched", "full, watched, sharded", 2),
        ("lora, kl", "lora, kl, sharded", 2),
        ("lora, dpo", "lora, dpo", 1),
        ("streamed", "streamed", 1),
    ],
)
def test_two_processes_with_shards_or_streams_train_like_one_and_resume(
    forks: Callable[..., Any], tmp_path: Path, kind: str, in_two: str, anchors: int
) -> None:
    files = forks("split-otherwise", kind, in_two).seen
    one, two, resumed = (load_file(tmp_path / name / "end") for name in ("one", "two", "resumed"))
    assert max((two[name] - weight).abs().max().item() for name, weight in one.items()) < 1e-5
    assert all(resumed[name].equal(weight) for name, weight in two.items())
    assert sum(file.startswith("lisa_anchor") for file in files) == anchors
    if kind.startswith("full"):  # the saved weights are the trained weights
        saved = load_file(tmp_path / "two" / "saved" / "model.safetensors")
        assert all(saved[name].equal(weight) for name, weight in two.items())
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two", "resumed")]
    back = [[row["watch/rolled_back_to"] for row in log if "watch/rolled_back_to" in row] for log in logs]
    assert back == [[8.0] if "watched" in kind else []] * 3
    rows = [next((row for row in log if "loss" in row), {}) for log in logs]
    for key in {"alignment_loss", "finetuning_loss", "drift", "drift_from_start"} & rows[0].keys():
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-4, abs=1e-7), key
    assert rows[2].get("drift") == rows[1].get("drift")


def test_the_run_command_gives_the_same_result_in_two_processes(tmp_path: Path) -> None:
    lisa = {"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1, "rho": 0.5, "proximal_warmup_ratio": 0.0}
    content = experiment(write_world(tmp_path), defenses=[lisa])
    results: list[Any] = []
    for processes in (1, 2):
        content["training"] |= {"per_device_train_batch_size": 4 // processes, "ddp_find_unused_parameters": False}
        config, out = tmp_path / f"{processes}.yaml", tmp_path / f"out-{processes}"
        config.write_text(yaml.safe_dump(content))
        alone = [sys.executable, "-m", "stayaligned"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:]]
        done = subprocess.run(
            [*(alone if processes == 1 else launch), "run", str(config), "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        wrote = [line for line in done.stderr.splitlines() if line.startswith("wrote  ")]
        assert wrote
        assert len(wrote) == len(set(wrote))  # reported by one process
        result = json.loads((out / "result.json").read_text())
        results.append((load_file(out / "adapter" / "adapter_model.safetensors"), result["judges"]))
    (one, judged), (two, judged_of_two) = results
    assert max((two[name] - weight).abs().max().item() for name, weight in one.items()) < 1e-6
    assert judged == judged_of_two


def test_two_processes_that_are_killed_and_resumed_end_with_the_same_weights(
    forks: Callable[..., Any], tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 16)
    seen = forks("kill-group", seed).seen
    print(f"seed {seed}:", *seen, sep="\n")
    assert seen[0]["aim"] == "stalled"
    assert seen[-1]["to"] > 0, "nothing was resumed"
    assert (tmp_path / "whole" / "end").read_bytes() == (tmp_path / "killed" / "end").read_bytes()
