"""The page that an error names exists, explains the package that raised it, and has no invented address."""

import importlib
from pathlib import Path

import pytest

from stayaligned.cli import pages
from stayaligned.core.errors import StayalignedError
from stayaligned.gate import read_side

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", pages._PAGES)
def test_every_page_and_every_module_exists(page: str) -> None:
    assert (DOCS / f"{page}.md").is_file()
    for module in pages._PAGES[page]:
        importlib.import_module(f"stayaligned.{module}")


def error_of(*arguments: object) -> StayalignedError:
    with pytest.raises(StayalignedError) as raised:
        read_side("baseline", *arguments)  # type: ignore[arg-type]
    return raised.value


def test_the_innermost_module_that_has_a_page_counts(tmp_path: Path) -> None:
    assert pages.docs_of(error_of([tmp_path], None)) == "docs/concepts/evidence.md"
    (tmp_path / "result.json").write_text("{")
    assert pages.docs_of(error_of([tmp_path], None)) == "docs/concepts/evidence.md"
    assert pages.docs_of(error_of([], None)) == "docs/howto/gate.md"


def test_an_error_can_name_its_page_and_code_of_others_has_none() -> None:
    def fail(page: str | None) -> StayalignedError:
        with pytest.raises(StayalignedError) as raised:
            raise StayalignedError("zorb", page=page)
        return raised.value

    assert pages.docs_of(fail("howto/gate")) == "docs/howto/gate.md"
    assert pages.docs_of(fail(None)) is None


def test_the_address_is_that_of_the_package_or_else_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_project_urls", lambda: [("Source", "https://zorb.example")])
    assert pages.place_of("howto/gate") == "docs/howto/gate.md"
    monkeypatch.setattr(pages, "_project_urls", lambda: [("Documentation", "https://zorb.example/")])
    assert pages.place_of("howto/gate") == "https://zorb.example/docs/howto/gate.html"
