"""Output directories: whose they are, and in which format."""

import json
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.evaluation.judges.keyword import Keyword
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.grid import Grid, run_grid
from stayaligned.experiments.rejudge import rejudge
from stayaligned.experiments.run import run_experiment
from stayaligned.experiments.stages.store import DIRECTORY_FORMAT, FORMAT_FILE, Store
from support.world import experiment, write_rows, write_world

COMMANDS = {"run": "experiment.yaml", "bench": "index.json", "judge": "judging.yaml"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def write_earlier_version(out: Path, own_file: str) -> None:
    """A directory as earlier versions wrote it: a marker, a stage, no format."""
    stage = out / "stages" / "generate-00112233445566778899"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text('{"stage": "generate", "key": "00", "seconds": 1.0}')
    (out / own_file).write_text('{"title": "t", "reference": "", "trainings": []}')


def continue_in(out: Path, command: str, world: Path) -> None:
    if command == "run":
        run_experiment(Experiment.model_validate(experiment(world)), out)
    elif command == "bench":
        run_grid(Grid(base=experiment(world), axes={"seed": [0]}), out, workers=1)
    else:
        row = {"id": "1", "prompt_set": "harmful", "prompt": [{"role": "user", "content": "zorb"}], "text": "wug"}
        rejudge(write_rows(world / "completions.jsonl", [row]), [Keyword()], out)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("found", [None, DIRECTORY_FORMAT + 1, "damaged"])
def test_a_directory_of_another_version_is_one_error_and_left_alone(
    world: Path, tmp_path: Path, command: str, found: object
) -> None:
    out = tmp_path / "out"
    write_earlier_version(out, COMMANDS[command])
    if found is not None:
        (out / FORMAT_FILE).write_text("[]" if found == "damaged" else json.dumps({"format_version": found}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(StayalignedError, match="another version of stayaligned") as caught:
        continue_in(out, command, world)
    assert "another --out" in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_directory_of_this_version_is_continued(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.refuse_foreign("experiment.yaml")
    with store.locked():
        pass
    store.refuse_foreign("experiment.yaml")  # killed before the command wrote its own file
    (store.root / "experiment.yaml").write_text("")
    (store.directory("data", "0" * 40)).mkdir()
    store.refuse_foreign("experiment.yaml")
    with pytest.raises(StayalignedError, match=r"there is no index\.json"):
        store.refuse_foreign("index.json")


def test_an_empty_directory_of_another_version_takes_the_present_format(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / FORMAT_FILE).write_text(json.dumps({"format_version": DIRECTORY_FORMAT + 7}))
    store = Store(tmp_path)
    store.refuse_foreign("experiment.yaml")
    with store.locked():
        (tmp_path / "experiment.yaml").write_text("model: m\n")
    store.refuse_foreign("experiment.yaml")
    assert json.loads((tmp_path / FORMAT_FILE).read_text()) == {"format_version": DIRECTORY_FORMAT}
