"""Workflows, forms and the container file: what they may do, and that they name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WRITES = {("docs", "publish"): {"pages", "id-token"}, ("publish", "attest"): {"id-token", "attestations"}} | {
    ("publish", "publish"): {"id-token"}
}


def load(path: Path) -> Any:
    content = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in content.items()}  # YAML 1.1 reads `on` as true


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_has_the_least_rights_and_is_off_until_it_is_switched_on(path: Path) -> None:
    workflow = load(path)
    assert "secrets." not in path.read_text()
    assert set(workflow["on"]) <= {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90
        assert "needs" in job or job["if"] == f"vars.STAYALIGNED_{path.stem.upper()} == 'on'"
        rights = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        assert rights == WRITES.get((path.stem, name), set())
        for step in job["steps"]:
            action = step.get("uses", "")
            assert not action or re.fullmatch(r"[\w-]+/[\w./-]+@(v\d+|[0-9a-f]{40}|release/v\d+)", action), action
            assert not action.startswith("actions/checkout") or step["with"]["persist-credentials"] is False
            made = re.match(r"make ([\w-]+)", step.get("run", ""))
            assert made is None or f"\n{made[1]}:" in (ROOT / "Makefile").read_text()


def test_packages_and_the_site_follow_a_tag_and_publishing_needs_the_protected_environment() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "publish"]
    tagged = [path.stem for path in WORKFLOWS if "tags" in (load(path)["on"].get("push") or {})]
    assert tagged == ["docs", "publish"]
    jobs = load(ROOT / ".github/workflows/publish.yml")["jobs"]
    assert [jobs[name].get("needs") for name in ("build", "attest", "publish")] == [None, "build", "attest"]
    assert jobs["publish"]["environment"] == "release"


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda p: p.stem)
def test_a_form_asks_for_something(path: Path) -> None:
    form = load(path)
    assert form["name"] and form["description"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    assert {field["type"] for field in form["body"]} <= {"textarea", "input", "dropdown", "checkboxes", "markdown"}


def test_the_citation_names_both_papers() -> None:
    citation = load(ROOT / "CITATION.cff")
    cited = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert cited == ["arXiv:2405.18641", "arXiv:2405.16833"]


def test_the_container_installs_extras_that_exist() -> None:
    from stayaligned.core.extras import EXTRAS

    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", (ROOT / "Containerfile").read_text())
    assert set(extras.split(",")) < EXTRAS.keys()
