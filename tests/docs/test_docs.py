"""README, docs and examples agree with the code: links, commands, options, make targets, paths and settings exist."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter
from typer.main import get_command

import stayaligned
from stayaligned.cli import app
from stayaligned.experiments.config.alignment import load_alignment
from stayaligned.experiments.config.experiment import Experiment, load_experiment
from stayaligned.experiments.grid import Grid, load_grid

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in ("docs", "studies") for page in (ROOT / name).glob("**/*.md"))])
EXAMPLES = sorted(
    path
    for name in ("examples", "src", "studies")
    for path in (ROOT / name).glob("**/*.yaml")
    if " --plugin " not in path.read_text()  # valid with its plug-in only: tests/studies
)
SOURCES = sorted([*(ROOT / "src").glob("**/*.py"), *(ROOT / "benchmarks").glob("**/*.py")])
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
MAX_PAGE_LINES = 300


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_guards_below_see_something() -> None:
    assert len(PAGES) >= 6
    assert len(EXAMPLES) >= 6
    assert len(SOURCES) >= 40
    assert sum(len(commands_in(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not heading or heading in headings_of(linked), f"{target}#{heading}"


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_page_of_the_documentation_is_too_long() -> None:
    lengths = {page.name: len(page.read_text().splitlines()) for page in DOCS}
    assert {name: length for name, length in lengths.items() if length > MAX_PAGE_LINES} == {}


def test_the_index_of_each_folder_links_to_every_page_of_it() -> None:
    for index in (page for page in DOCS if page.name == "index.md"):
        linked = set(re.findall(r"^- \**\[[^\]]+\]\(([^)#\s]+)\)", index.read_text(), flags=re.MULTILINE))
        pages = {page.name for page in index.parent.glob("*.md")} - {"index.md", "README.md"}
        folders = {f"{below.parent.name}/index.md" for below in index.parent.glob("*/index.md")}
        assert pages | folders <= linked, index


def test_a_page_is_known_by_the_name_of_its_file() -> None:
    names = [page.stem for page in DOCS if page.name not in ("index.md", "README.md")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_source_path_that_is_named_exists(page: Path) -> None:
    for path in re.findall(r"`((?:src|tests|docs|examples|benchmarks|studies)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_module_that_the_changelog_calls_new_exists() -> None:
    cells = re.findall(
        r"^\| `stayaligned\.[^|]+\| ([^|]+) \|$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    names = [name.removeprefix("stayaligned.") for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(names) >= 40
    for name in names:
        path = ROOT / "src" / "stayaligned" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), name


def test_the_tree_of_the_readme_lists_every_part_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text().partition("```\nsrc/stayaligned/\n")[2].partition("```")[0]
    listed = re.findall(r"^  (\w+)(?:/|\.py) +\S", tree, flags=re.MULTILINE)
    parts = {path.stem for path in (ROOT / "src" / "stayaligned").iterdir() if not path.name.startswith("__")}
    assert sorted(listed) == sorted(parts - {"py"})


def commands_in(page: Path) -> list[list[str]]:
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = re.findall(r"(?:^(?: {4,}|\$ )|`)(stayaligned [a-z][^`\n]*)", text, flags=re.MULTILINE)
    return [shlex.split(re.sub(r"\s#.*", "", line.replace("…", "x"))) for line in found]


@pytest.mark.parametrize("page", [p for p in PAGES if commands_in(p)], ids=relative)
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for _, name, *arguments in commands_in(page):
        assert name in commands, name
        command = commands[name]
        if hasattr(command, "commands"):  # `subspace build`
            assert arguments[0] in command.commands, arguments[0]
            command = command.commands[arguments[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        named = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert named <= options, (name, named - options)


def blocks_in(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_in(p, "python")], ids=relative)
def test_every_python_block_parses_and_imports_names_that_exist(page: Path) -> None:
    for block in blocks_in(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stayaligned"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


FIELDS = get_type_hints(Experiment, include_extras=True)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_in(p, "yaml")], ids=relative)
def test_every_yaml_block_holds_valid_settings(page: Path) -> None:
    for block in blocks_in(page, "yaml"):
        content = yaml.safe_load(block)
        grid = "axes" in content
        assert content.keys() <= (Grid if grid else Experiment).model_fields.keys()
        base = content["base"] if grid else content
        settings = [base, *(row for row in content.get("axes", {}).get("method", []))]
        for value in settings:
            for name in value:
                if name != "label":
                    TypeAdapter(FIELDS[name]).validate_python(value[name])


TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def make_targets_in(text: str) -> set[str]:
    return set(re.findall(r"(?:^ {4}|^|`)make ([\w-]+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    assert make_targets_in(page.read_text()) <= TARGETS


def test_the_page_for_contributors_names_every_make_target() -> None:
    assert make_targets_in((ROOT / "CONTRIBUTING.md").read_text()) == TARGETS


def test_every_make_target_has_a_help_text() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+) +\S", shown, flags=re.MULTILINE)) == TARGETS


def test_ci_runs_the_checks_and_every_test() -> None:
    assert make_targets_in((ROOT / ".ci" / "run").read_text()) == {"check", "test", "slow", "release-check"}
    assert "test" in make_targets_in((ROOT / "README.md").read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_every_example_is_valid_and_says_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    commands = re.findall(r"^#\s+(?:.*: )?(stayaligned (?:run|bench|demo|align) .*)$", text, flags=re.MULTILINE)
    assert commands, "the header comment names the command that runs it"
    if "demo" not in commands[0]:
        assert str(path.relative_to(ROOT)) in commands[0]
    overrides = placeholder_overrides(path)
    if "data" in yaml.safe_load(text):
        monkeypatch.chdir(ROOT)  # a chat template beside it is named from there
        assert load_alignment(str(path), {}, overrides)
    elif "axes" in yaml.safe_load(text):
        assert load_grid(path, overrides).expand(path.name)
    else:
        assert load_experiment(path, overrides)


def placeholder_overrides(path: Path) -> list[str]:
    """Replace each `data/…`, a file of the user's own, and each `real/…`, of `make model`, by a file that exists."""

    def places(value: object, place: str = "") -> list[str]:
        if isinstance(value, dict):
            return [p for key, item in value.items() for p in places(item, f"{place}.{key}".strip("."))]
        if isinstance(value, list):
            return [p for index, item in enumerate(value) for p in places(item, f"{place}.{index}")]
        return [place] if isinstance(value, str) and value.startswith(("data/", "real/")) else []

    return [f"{place}={Path(__file__)}" for place in places(yaml.safe_load(path.read_text()))]


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in stayaligned.__all__:
        value = getattr(stayaligned, name)
        assert inspect.getdoc(value) or name == "Split", name  # an alias of a Literal has no docstring


def test_no_file_names_a_place_of_one_machine() -> None:
    private = re.compile(r"(?<![\w./])/(?:work|root|home/\w+)/")
    for path in [
        *PAGES,
        *EXAMPLES,
        *SOURCES,
        *(ROOT / "tests").glob("**/*.py"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]:
        if path != Path(__file__):
            assert not private.search(path.read_text()), path
