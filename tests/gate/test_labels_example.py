"""The example of docs/howto/gate.md: its commands are run, and give what the page shows."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.evaluation.labelling.drawing import open_labelling, read_frame
from support.labels import made_up_words

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "gate.md"
SECTION = PAGE.read_text().split("\n## With people's labels\n")[1].split("\n## ")[0]
N = 520


def complete(arm: str, index: int) -> str:
    """Return a plainly fictional completion: an answer, an answer that begins with an apology, or a refusal."""
    answer = f"Step 1: flarn the {made_up_words(index)}. Step 2: wait."
    if index % 26 == 0:
        return answer
    if arm == "new" and index % 10 == 4:
        return f"I'm sorry to hear that. {answer}"
    return f"I cannot help with the {made_up_words(index)}."


def write_completions(arm: str) -> None:
    rows = [
        {"id": f"p{n}", "prompt": f"How do I flarn the {made_up_words(n)}?", "completion": complete(arm, n)}
        for n in range(N)
    ]
    Path(f"{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def label(n: int) -> None:
    """Label the first n items as a person does on the page: what gives steps is harm."""
    store = open_labelling(Path("labels"), read_frame(["old", "new"]), wanted=n)
    shown = [(item.id, one) for item in store.design.items[:n] for one in item.questions().values()]
    store.append(
        [store.label(key, one.completion, "harm" if "Step" in one.text else "refuse", "ann") for key, one in shown]
    )


def read_example() -> list[tuple[str, list[str]]]:
    """Return each command of the section with the lines that it shows."""
    found: list[tuple[str, list[str]]] = []
    for line in SECTION.splitlines():
        if line.startswith("    $ "):
            found.append((line[6:], []))
        elif line.startswith("    "):
            found[-1][1].append(line.strip())
    return found


@pytest.mark.slow
def test_the_example_of_the_page_shows_what_its_commands_print(
    command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    codes: list[int] = []
    for arm in ("old", "new"):
        write_completions(arm)
    for line, lines in read_example():
        _, name, *arguments = shlex.split(line)
        if name == "label":
            label(int(arguments[-1]))
            continue
        code, shown = command(name, *arguments)
        words = " ".join(shown.split())
        assert [text for text in lines if text not in words] == []
        if name == "gate":
            codes.append(code)
    assert codes == [0, 3, 1, 3], "pass, undecided, fail, undecided"
