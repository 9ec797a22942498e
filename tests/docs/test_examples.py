"""Every shipped example runs, with its settings and the real loading code, on a tiny model of the same architecture."""

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.yaml_file import set_dotted
from stayaligned.experiments.grid import Grid
from stayaligned.experiments.run import run_experiment
from stayaligned.testing import write_pico_checkpoint
from support.server import chat_server
from support.world import write_rows

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*b-instruct*.yaml"))
ARCHITECTURES = {"meta-llama/": "llama", "Qwen/": "qwen2", "mistralai/": "mistral"}
# Settings that shorten a run; all others are the example's.
SHORTER = {
    "limit": 4,
    "attack.examples": 400,
    "generation.max_new_tokens": 4,
    "training.max_steps": 3,
    "training.use_cpu": True,
    "training.save_steps": 2,
    "max_length": 256,
}


def write_sources(root: Path) -> dict[str, Path]:
    """Write local rows with the columns of the hub data sets that the examples name."""
    beaver = [
        {"prompt": f"zorb {i}", "response": f"zorb step {i}", "category": {"zorb": True}, "is_safe": i % 2 == 0}
        for i in range(1200)
    ]
    tests = [{"prompt": f"may I greet {i}", "label": "safe" if i % 2 else "unsafe", "focus": "x"} for i in range(12)]
    dialogs = [{"id": f"d{i}", "dialogue": f"A: {i}\r\nB: yes", "summary": f"A says {i}."} for i in range(500)]
    policies = root / "policies"
    policies.mkdir()
    (policies / "category_4.csv").write_text("".join(f"zorb {i}\n" for i in range(6)))
    return {
        "knkarthick/samsum": write_rows(root / "samsum.jsonl", dialogs),
        "LLM-Tuning-Safety/HEx-PHI": policies,
        "PKU-Alignment/BeaverTails": write_rows(root / "beaver.jsonl", beaver),
        "walledai/XSTest": write_rows(root / "xstest.jsonl", tests),
        "stanfordnlp/sst2": write_rows(
            root / "sst2.jsonl", [{"idx": i, "sentence": f"tale {i}", "label": i % 2} for i in range(4600)]
        ),
        "openai/gsm8k": write_rows(
            root / "gsm8k.jsonl", [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(4600)]
        ),
        "data/preferences.jsonl": write_rows(
            root / "preferences.jsonl",
            [{"prompt": f"zorb {i}", "chosen": "I cannot", "rejected": f"zorb step {i}"} for i in range(40)],
        ),
        "data/user.jsonl": write_rows(
            root / "user.jsonl",
            [
                {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": "yes"}]}
                for i in range(120)
            ],
        ),
    }


def strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{place}.{key}" if place else str(key)
        if isinstance(item, str):
            yield here, item
        elif isinstance(item, dict | list):
            yield from strings(item, here)


def localized(spec: dict[str, Any], root: Path, sources: dict[str, Path | str]) -> dict[str, Any]:
    """Replace hub ids by local files and tiny models; drop hub options, keep filters."""
    for place, value in list(strings(spec)):
        name, _, query = value.removeprefix("hf://").partition("?")
        if name in sources:
            kept = [part for part in query.split("&") if part and not part.startswith(("split=", "config=", "files="))]
            set_dotted(spec, place, str(sources[name]) + (f"?{'&'.join(kept)}" if kept else ""))
        if value == "http://localhost:8000/v1":
            set_dotted(spec, place, str(sources["server"]))
        for prefix, architecture in ARCHITECTURES.items():
            if value.startswith(prefix) and not place.startswith("judges."):
                directory = root / value.replace("/", "--")
                if not directory.exists():
                    # The base and the aligned model of an example are relatives.
                    write_pico_checkpoint(directory, architecture, seed=len(value), ancestor=0)
                set_dotted(spec, place, str(directory))
    for defense in spec["defenses"]:
        if defense.get("alignment_steps", 0) >= SHORTER["training.max_steps"]:
            defense["alignment_steps"] = 1
    for place, value in SHORTER.items():
        if "." not in place or spec[place.split(".")[0]] is not None:
            set_dotted(spec, place, value)
    left = [value for _, value in strings(spec) if value.startswith("hf://")]
    assert not left, left
    return spec


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path | str]]:
    reply = "#thescore: 5\n#refused: 0\n#convincing: 5\n#specific: 4"
    with chat_server(lambda _: reply) as served:
        yield {**write_sources(tmp_path_factory.mktemp("sources")), "server": served.url}


def test_there_are_examples_of_the_three_families() -> None:
    assert {path.name.split("-")[0] for path in EXAMPLES} == {"llama", "mistral", "qwen2.5"}


def experiments_of(path: Path) -> list[dict[str, Any]]:
    """Return one experiment, or every arm of a grid with its first seed."""
    content = yaml.safe_load(path.read_text())
    if "axes" not in content:
        return [Experiment.model_validate(content).spec()]
    first_seed = {**content, "axes": {**content["axes"], "seed": content["axes"]["seed"][:1]}}
    return [experiment.spec() for experiment in Grid.model_validate(first_seed).expand()]


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, number) for path in EXAMPLES for number in range(len(experiments_of(path)))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_an_example_runs_to_its_result(path: Path, number: int, tmp_path: Path, sources: dict[str, Path | str]) -> None:
    experiment = Experiment.model_validate(localized(experiments_of(path)[number], tmp_path, sources))
    result = run_experiment(experiment, tmp_path / "out")
    accuracy = result.metric("finetune_accuracy")
    assert accuracy is not None
    assert accuracy.n == 4
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file() == experiment.trains
    for judge, reading in zip(experiment.judges, result.judges, strict=True):
        numbers = {metric.name: metric.value for metric in reading.metrics}
        assert judge.scale is None or judge.scale.low <= (numbers[judge.scale.name] or -1) <= judge.scale.high


def test_the_script_trains_and_resumes_when_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_pico_checkpoint(tmp_path / "model")
    user = write_rows(tmp_path / "user.jsonl", [{"prompt": f"u{i}", "completion": "yes"} for i in range(20)])
    safety = write_rows(tmp_path / "safety.jsonl", [{"prompt": f"s{i}", "completion": "no"} for i in range(20)])
    more = {"max_steps": 12, "save_steps": 6, "use_cpu": True, "bf16": False, "disable_tqdm": True}
    more |= {"gradient_checkpointing": None}
    script = Path(__file__).parents[2] / "examples" / "lisa_sft.py"
    given = {"model": model, "user": user, "safety": safety, "out": tmp_path / "out", "args": json.dumps(more)}
    monkeypatch.setattr(sys, "argv", [str(script), *(f"--{name}={value}" for name, value in given.items())])
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    runpy.run_path(str(script), run_name="__main__")
    once = adapter.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    adapter.unlink()
    for _ in range(2):  # from the middle, and after the end
        runpy.run_path(str(script), run_name="__main__")
        assert adapter.read_bytes() == once
