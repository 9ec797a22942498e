"""A small core: what works without any extra, and the one error that names the extra that is missing."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.core.settings import Generation, LmEval, ServedModel
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.packages import require_for_training, require_installed
from support.runs import evidence, outcomes, write_run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = sorted(module for modules in EXTRAS.values() for module in modules)
IMPORTED_AS = {"pyyaml": "yaml", "rouge_score": "rouge_score", "huggingface_hub": "huggingface_hub"}
COMES_WITH = {
    "markupsafe": "jinja2",
    "tqdm": "huggingface_hub",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "pydantic_core": "pydantic",
}
"""Modules that another requirement always installs."""
PROGRAM = """
import json, sys
for name in {blocked!r}:
    sys.modules[name] = None
from stayaligned.cli import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["stayaligned", *arguments]
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    print("ended", code, flush=True)
    print("ended", code, file=sys.stderr, flush=True)
"""


def modules_of(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=!\[; ]", line)[0].lower().replace("-", "_") for line in requirements]
    return {IMPORTED_AS.get(name, name) for name in names} - {"stayaligned"}


def run(commands: list[list[object]], blocked: list[str] = OPTIONAL) -> list[tuple[int, str, str]]:
    """Run commands where some modules are not installed; return the exit code, stdout and stderr of each."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(blocked=blocked)],
        input=json.dumps([[str(part) for part in command] for command in commands]),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    shown, errors = (re.split(r"ended (\d+)\n", text) for text in (ended.stdout, ended.stderr))
    assert len(shown) == 2 * len(commands) + 1, ended.stderr
    return [(int(code), out, err) for code, out, err in zip(shown[1::2], shown[::2], errors[::2], strict=False)]


def test_the_table_of_extras_is_that_of_the_package() -> None:
    declared = PROJECT["optional-dependencies"]
    assert {extra: modules_of(declared[extra]) for extra in EXTRAS} == {k: set(v) for k, v in EXTRAS.items()}
    assert declared["all"] == [f"stayaligned[{','.join(EXTRAS)}]"]


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    known = modules_of(PROJECT["dependencies"]) | set(OPTIONAL) | {"stayaligned"} | sys.stdlib_module_names
    nodes = [node for path in (ROOT / "src").glob("**/*.py") for node in ast.walk(ast.parse(path.read_text()))]
    found = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found - known - COMES_WITH.keys() == {"jaxtyping"}  # which checks shapes in tests, where it is installed
    assert modules_of(PROJECT["dependencies"]) <= found


def test_the_core_alone_lists_patches_and_decides(tmp_path: Path) -> None:
    for name in ("before", "after"):
        write_run(tmp_path / name, evidence({"keyword": outcomes(400, 8)}), arm=name)
    write_models(tmp_path)
    commands = [
        ["--help"], ["--version"], ["list"], ["show", "defense", "lisa"], ["env"],
        ["new", "judge", "zorb", "--dir", tmp_path],
        ["project", tmp_path / "adapter", "--aligned", tmp_path / "chat", "--base", tmp_path / "base",
         "--out", tmp_path / "safe", "--threshold", "0.35"],
        ["gate", "--baseline", tmp_path / "before", "--candidate", tmp_path / "after", "--max-harm-increase", "5%"],
        ["power", "--rate", "5%", "--prompts", "200"],
    ]  # fmt: skip
    for command, (code, shown, errors) in zip(commands, run(commands), strict=True):
        assert code == 0, (command, shown, errors)
    assert (tmp_path / "safe" / "adapter_model.safetensors").is_file()


def write_models(root: Path) -> None:
    """Write a base model, an aligned model and an adapter as files, without transformers."""
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    base = torch.randn(16, 16)
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    for role, weight in (("base", base), ("chat", base + 0.1 * torch.randn(16, 16))):
        (root / role).mkdir()
        (root / role / "config.json").write_text(json.dumps(config))
        save_file({f"{name}.weight": weight}, root / role / "model.safetensors", metadata={"format": "pt"})
    (root / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    factors = {f"base_model.model.{name}.lora_{x}.weight": torch.randn(*shape) for x, shape in SHAPES.items()}
    save_file(factors, root / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


SHAPES = {"A": (2, 16), "B": (16, 2)}


def test_what_needs_an_extra_is_one_error_with_the_command_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evidence({"keyword": outcomes(400, 8)}))
    write_models(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "0", "prompt": "zorb?", "completion": "No."}\n')
    files = {*tmp_path.rglob("*")}
    out = ["--out", tmp_path / "out"]
    cases: list[tuple[list[object], str]] = [
        (["validate", "examples/testbed.yaml"], "models,report"),
        (["validate", "examples/llama-2-7b-align.yaml"], "models"),
        (["validate", "examples/testbed.yaml", "trainer=sft"], "models,trl,report"),
        (["validate", "examples/llama-3-8b-instruct-dialog-summary-safe-lora.yaml"], "models,report,eval"),
        (["bench", "examples/testbed-thresholds.yaml", *out], "models,report"),
        (["align", tmp_path, "--data", rows, *out], "models"),
        (["evaluate", tmp_path, "--harmful-prompts", rows, *out], "models,report"),
        (["judge", tmp_path / "run", "--judge", "keyword", *out], "report"),
        (["report", tmp_path / "run"], "report"),
        (
            [
                "project",
                tmp_path / "adapter",
                "--aligned",
                tmp_path / "chat",
                "--base",
                tmp_path / "base",
                "--scan",
                *out,
            ],
            "report",
        ),
        (
            [
                "subspace",
                "build",
                "--aligned",
                tmp_path / "chat",
                "--base",
                tmp_path / "base",
                "--rank",
                "2",
                "--out",
                tmp_path / "s",
            ],
            "models",
        ),
    ]
    for (command, extras), (code, shown, errors) in zip(cases, run([one for one, _ in cases]), strict=True):
        assert (code, shown) == (2, ""), (command, errors)
        lines = errors.strip().splitlines()
        assert lines[0].startswith("error: not installed: "), errors
        assert lines[1:] == [f"hint: pip install 'stayaligned[{extras}]'", "docs: docs/howto/install.md"]
    assert {*tmp_path.rglob("*")} == files


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_a_configuration_tells_every_package_that_it_will_import(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *OPTIONAL)
    served = Generation(backend="endpoint", endpoint=ServedModel(base_url="http://localhost/v1", model="zorb"))
    asked = Experiment(model="zorb", training=None, harmful_prompts="rows.jsonl", generation=served)
    with pytest.raises(StayalignedError, match="for generation") as caught:
        require_installed([asked])
    assert caught.value.hint == "pip install 'stayaligned[endpoint]'"
    from_hub = asked.model_copy(update={"benign_prompts": "hf://zorb/quib"})
    with pytest.raises(StayalignedError, match=r"datasets \(for hf://zorb/quib\)"):
        require_installed([from_hub])
    local = asked.model_copy(update={"generation": Generation(), "lm_eval": LmEval(tasks=("zorbs",))})
    with pytest.raises(StayalignedError) as caught:
        require_installed([asked, local], report=True)
    assert caught.value.hint == "pip install 'stayaligned[models,report,endpoint,eval]'"
    with pytest.raises(StayalignedError, match=r"trl \(for trainer: sft\)"):
        require_for_training("sft")


def test_a_plug_ins_own_package_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StayalignedError, match=r"not installed: zorb-lib \(for the judge, the task\)") as caught:
        require_packages({"the judge": ["zorb_lib"], "the task": ["zorb_lib", "json"]})
    assert caught.value.hint == "pip install zorb-lib"
    without(monkeypatch, "matplotlib")
    with pytest.raises(StayalignedError) as caught:
        require_packages({"the judge": ["zorb_lib", "matplotlib"]})
    assert caught.value.hint == "pip install 'stayaligned[report]' zorb-lib"
