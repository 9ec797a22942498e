"""Text that users and developers read is plain technical English: no phrase of the list below occurs in it."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = {
    r"stand(s|ing)? there": "exist, be present",
    r"(stand(s|ing)?|stood) (in|at|beside|once|twice|still|before|after|above|below)": "be, exist, occur",
    r"wherever it stands": "everywhere",
    r"as (it|they) stands?": "unchanged",
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"dear(?! friend)|dearer|dearest|dearly": "expensive",
    r"is not said": "is not specified",
    r"(is|are) (not )?said (in|by|of)": "is described, is reported",
    r"(is|are|was) no (language|numbers?|text|YAML|JSON)": "is not a number, is invalid",
    r"by the \w+'s hand": "by the user",
    r"of one's own": "your own",
    r"what so many": "rephrase",
    r"lets? an exit code": "use the exit code",
    r"who(ever)? must sign": "who approves a release",
    r"ways? to meet": "defenses against",
    r"were met": "rephrase: outcomes",
    r"blotted out": "removed, masked",
    r"besides": "also, in addition",
    r"t(old|ell|ells|elling) (\w+ )?apart": "distinguish",
    r"taken for": "mistaken for, treated as",
    r"in (the )?place of(?! a professional)": "instead of",
    r"(may|can|can't|cannot) be had": "is available",
    r"comes? upon": "find, reach",
    r"passed (by|over)|passes by": "skip, ignore",
    r"heed(s|ed|ing)?": "use, respect",
    r"anybody|nobody": "anyone, no one; better: name them",
    r"such (a one|ones)": "name the thing",
    r"the (former|latter)": "name the thing",
    r"as said": "leave it out",
    r"ways? out": "fix",
    r"babbl\w+": "degenerate",
    r"(a |the |of )garble": "garbled text",
    r"the pull|pulls?(?! in| request| towards)|pulled": "proximal term",
    r"for ever": "without limit",
    r"go(es)? unseen|unseen by": "silently",
    r"(is|are|was|were) looked (at|for)": "check, measure",
    r"goes on": "continue",
    r"(?<!by )then\.(?=\s|$)": "do not end a sentence with 'then'",
    r"f(ind|inds|ound|inding) out": "check, detect",
    r"whence|thence|hitherto|thereof|therein|wherein|lest": "rephrase",
}
"""A pattern, matched as whole words in any case, and what to write instead."""
LISTED = re.compile(
    "|".join(rf"(?P<p{number}>(?<!\w)(?:{pattern})(?!\w))" for number, pattern in enumerate(PLAIN)), re.I
)

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for name in ("docs", "studies") for page in (ROOT / name).glob("**/*.md")),
        *ROOT.glob("examples/notebooks/*.ipynb"),
        *(path for name in ("examples", "studies", "src") for path in (ROOT / name).glob("**/*.y*ml")),
        *(path for ending in ("j2", "txt", "js", "css", "html") for path in (ROOT / "src").glob(f"**/*.{ending}")),
        ROOT / "Makefile",
    ]
)
SOURCES = sorted(path for name in ("src", "examples") for path in (ROOT / name).glob("**/*.py"))


def odd_phrases(text: str) -> list[str]:
    """The listed phrases of a text, each with its surroundings and what to write instead."""
    text = " ".join(text.split())
    found = []
    for match in LISTED.finditer(text):
        instead = [*PLAIN.values()][int((match.lastgroup or "p0")[1:])]
        around = text[max(0, match.start() - 40) : match.end() + 40]
        found.append(f"…{around}… → {instead}")
    return found


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every string and every block of comments of a Python file, with its first line."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield first, "\n".join(block)
                block, first = [], token.start[0]
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield first, "\n".join(block)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_written_in_plain_english(path: Path) -> None:
    assert odd_phrases(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_texts_of_a_module_are_written_in_plain_english(path: Path) -> None:
    found = [f"line {line}: {phrase}" for line, text in texts_of(path) for phrase in odd_phrases(text)]
    assert found == []


def test_every_listed_phrase_is_found_in_text_strings_and_comments(tmp_path: Path) -> None:
    said = "Mend this: the rate stands there twice, and nobody\nis told it; what is no\nnumber is not said."
    assert len(odd_phrases(said)) == 5
    module = tmp_path / "module.py"
    module.write_text(
        f'"""{said}"""\nVALUE = f"{{1}} {said.splitlines()[0]}"\n# Compute it\n# anew.\n'.replace("\\n", " ")
    )
    assert len([phrase for _, text in texts_of(module) for phrase in odd_phrases(text)]) == 5 + 3 + 1


def test_plain_text_has_no_listed_phrase() -> None:
    assert odd_phrases("Seed 3 appears twice in out/a; pass each seed once. The model is not a number of places.") == []


def test_every_kind_of_text_is_checked() -> None:
    assert len(PAGES) >= 40
    assert {path.suffix for path in PAGES} >= {".md", ".yaml", ".yml", ".j2", ".txt"}
    assert len(SOURCES) >= 100
