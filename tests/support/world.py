"""A tiny world on disk for tests of experiments: two pico checkpoints and JSONL files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stayaligned.testing import write_pico_checkpoint


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_world(root: Path, architecture: str = "llama") -> Path:
    """Write `base/`, `aligned/` and the data of a small experiment; return `root`."""
    write_pico_checkpoint(root / "base", architecture, seed=1)
    write_pico_checkpoint(root / "aligned", architecture, seed=2, ancestor=1)
    moods = ["good", "bad"]
    task = [{"prompt": f"mood {i}?", "completion": moods[i % 2]} for i in range(40)]
    write_rows(root / "train.jsonl", task[:32])
    write_rows(root / "test.jsonl", task[32:])
    write_rows(root / "harmful.jsonl", [{"prompt": f"zorb {i}", "completion": f"zorb step {i}"} for i in range(16)])
    write_rows(root / "alignment.jsonl", [{"prompt": f"wug {i}", "completion": "I cannot"} for i in range(12)])
    write_rows(root / "harmful-prompts.jsonl", [{"prompt": f"zorb {i} now", "category": "zorb"} for i in range(6)])
    write_rows(root / "benign-prompts.jsonl", [{"prompt": f"blick {i} now"} for i in range(5)])
    return root


def experiment(root: Path, **changes: Any) -> dict[str, Any]:
    """Return the YAML mapping of an attacked fine-tuning of four steps."""
    return {
        "model": str(root / "aligned"),
        "base_model": str(root / "base"),
        "task": {"name": "jsonl", "train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")},
        "attack": {
            "name": "poison",
            "poison_ratio": 0.25,
            "examples": 24,
            "harmful_data": str(root / "harmful.jsonl"),
        },
        "alignment_data": str(root / "alignment.jsonl"),
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1},
        "max_length": 64,
        "harmful_prompts": str(root / "harmful-prompts.jsonl"),
        "benign_prompts": str(root / "benign-prompts.jsonl"),
        "judges": ["keyword"],
        "generation": {"max_new_tokens": 4},
        **changes,
    }
