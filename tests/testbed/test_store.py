import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.testbed import NAMES, Recipe, build, building, is_reference, recipe, reference_key, resolve, store


def test_naming_a_testbed_imports_no_torch() -> None:
    program = (
        "import sys; from stayaligned import testbed; testbed.is_reference('x'); "
        "testbed.reference_key('testbed:base', 0); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("testbed:base", True), ("testbed:nothing", True), ("base", False), ("./testbed/base", False)],
)
def test_a_reference_begins_with_the_testbeds_name(text: str, expected: bool) -> None:
    assert is_reference(text) is expected


@pytest.mark.parametrize("ask", [resolve, reference_key])
@pytest.mark.parametrize("reference", ["testbed:alinged", "aligned", "testbed:../x", "testbed:data", "testbed:"])
def test_an_unknown_name_is_refused_with_the_names_that_exist(ask: object, reference: str) -> None:
    with pytest.raises(StayalignedError) as caught:
        ask(reference, 0)  # type: ignore[operator]
    assert repr(reference) in caught.value.message
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in NAMES)


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(StayalignedError, match="Did you mean 'aligned'"):
        reference_key("testbed:alinged", 0)


def test_the_key_changes_with_seed_recipe_behavior_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from stayaligned.testbed import recipe

    keys = [Recipe().key(0), Recipe().key(1), Recipe(base_steps=999).key(0)]
    monkeypatch.setattr(recipe, "BEHAVIOR_VERSION", 10**6)
    keys.append(Recipe().key(0))
    monkeypatch.setattr(recipe, "_version", lambda name: f"{name} 0")
    keys.append(Recipe().key(0))
    assert len(set(keys)) == len(keys)


def test_reference_keys_differ_by_seed_and_name() -> None:
    keys = {reference_key(f"testbed:{name}", seed) for name in NAMES for seed in (0, 1)}
    assert len(keys) == 2 * len(NAMES)


def test_resolve_gives_the_path_in_the_cache_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAYALIGNED_CACHE", str(tmp_path))
    finished = tmp_path / "testbed" / Recipe().key(4)
    finished.mkdir(parents=True)
    assert resolve("testbed:data/skills.jsonl", 4) == finished / "data" / "skills.jsonl"


def test_a_finished_testbed_is_not_built_again(directory: Path, miniature: Recipe) -> None:
    told: list[float] = []
    again = build(0, recipe=miniature, cache=directory.parents[1], progress=lambda _stage, done: told.append(done))
    assert again == directory
    assert told == []


def test_concurrent_processes_build_a_testbed_once(
    miniature: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    started = threading.Event()

    def construct(directory: Path, seed: int, *_: object) -> None:
        started.set()
        time.sleep(0.2)
        built.append(seed)
        (directory / "testbed.json").write_text("{}")

    monkeypatch.setattr(building, "construct", construct)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build, 0, recipe=miniature, cache=tmp_path)
        assert started.wait(10)
        second = pool.submit(build, 0, recipe=miniature, cache=tmp_path)
        assert first.result() == second.result()
    assert built == [0]


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_looks_finished_and_the_next_one_clears_up(
    miniature: Recipe, tmp_path: Path
) -> None:
    endless = miniature.model_copy(update={"base_steps": 10**5})
    program = (
        "import sys; from pathlib import Path; from stayaligned.testbed import Recipe, build; "
        "build(0, recipe=Recipe.model_validate_json(sys.argv[1]), cache=Path(sys.argv[2]), "
        "progress=lambda stage, done: print(stage, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, endless.model_dump_json(), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert any("judge" in line for line in process.stdout)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    key = endless.key(0)
    remains = list((tmp_path / "testbed").glob(f".{key}.*.partial"))
    assert remains
    assert not (tmp_path / "testbed" / key).exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "construct", lambda directory, *_: (directory / "testbed.json").write_text("{}"))
        assert build(0, recipe=endless, cache=tmp_path) == tmp_path / "testbed" / key
    assert not list((tmp_path / "testbed").glob("*.partial"))
    assert not any(path.exists() for path in remains)


def test_the_cache_defaults_to_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAYALIGNED_CACHE", raising=False)
    assert store._cache_root(None) == Path.home() / ".cache" / "stayaligned"


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(miniature: Recipe) -> None:
    with pytest.raises(StayalignedError, match="/proc/nowhere/testbed: the cache of the testbed can't be written") as e:
        build(0, recipe=miniature, cache=Path("/proc/nowhere"))
    assert "STAYALIGNED_CACHE" in (e.value.hint or "")


def test_names_can_be_checked_without_the_packages_that_build_the_testbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    recipe._version.cache_clear()
    monkeypatch.setattr(recipe, "version", version)
    assert reference_key("testbed:aligned", 0)
    recipe._version.cache_clear()
