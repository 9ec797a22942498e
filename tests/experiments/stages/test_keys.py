"""A judge's identity: what it depends on, and what it does not."""

from pathlib import Path

import pytest

from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.evaluation.judges.classifier import Classifier
from stayaligned.evaluation.judges.keyword import Keyword
from stayaligned.evaluation.judges.policy_rubric import PolicyRubric
from stayaligned.evaluation.judges.strong_reject import StrongReject
from stayaligned.evaluation.verdicts import verdict_key
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.experiments.stages.keys import identify, identify_judge, judge_key

PLUGIN = """
from stayaligned import Judge
class {name}(Judge):
    name = "{lower}"
    def judge(self, completions): return []{comment}
"""


def completion(text: str) -> Completion:
    return Completion(id="1", prompt_set="harmful", prompt=(Message(role="user", content="zorb?"),), text=text)


def plugin_judge(path: Path, name: str, comment: str = "") -> Judge:
    path.write_text(PLUGIN.format(name=name, lower=name.lower(), comment=comment))
    known = dict(JUDGES._plugins)
    try:
        load_plugin(path, REGISTRIES)
        return JUDGES.parse(name.lower())
    finally:
        JUDGES._plugins.clear()
        JUDGES._plugins.update(known)


def test_settings_and_source_are_part_of_the_identity_and_operational_settings_are_not(tmp_path: Path) -> None:
    assert identify_judge(Keyword(), 0) == identify_judge(Keyword(), 3)
    assert identify_judge(Keyword(), 0) != identify_judge(Keyword(match="start"), 0)
    model = str(tmp_path / "judge")
    assert identify_judge(Classifier(model=model, batch_size=1), 0) == identify_judge(Classifier(model=model), 0)


def test_a_model_counts_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    for name, content in (("here", "{}"), ("there", "{}"), ("other", '{"x": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    here, there, other = (identify_judge(Classifier(model=str(tmp_path / n)), 0) for n in ("here", "there", "other"))
    assert here == there
    assert here.settings["model"].startswith("sha256:")
    (difference,) = here.differences(other)
    assert difference.startswith("setting 'model'")


def test_a_testbed_reference_counts_by_the_testbeds_recipe_and_seed() -> None:
    judge = Classifier(model="testbed:judge")
    assert identify_judge(judge, 0) == identify_judge(judge, 0)
    assert identify_judge(judge, 0) != identify_judge(judge, 1)


def test_judges_of_one_family_share_the_source_of_the_family_and_differ_in_their_own() -> None:
    server = {"base_url": "http://h/v1", "model": "m"}
    rubric, strong = (identify_judge(kind(**server), 0) for kind in (PolicyRubric, StrongReject))
    assert rubric.source != strong.source


@pytest.mark.parametrize("comment", ["", "  # edited"])
def test_a_plug_in_counts_by_its_file(tmp_path: Path, comment: str) -> None:
    one = identify_judge(plugin_judge(tmp_path / "one.py", "Zorbish"), 0)
    (tmp_path / "copy").mkdir()
    two = identify_judge(plugin_judge(tmp_path / "copy" / "one.py", "Zorbish", comment), 0)
    assert (one == two) == (comment == "")


def test_one_scheme_keys_a_verdict_and_a_stage() -> None:
    identity = identify_judge(Keyword(), 0)
    other = identify_judge(Keyword(match="start"), 0)
    rows = [completion("zorb"), completion("wug")]
    keys = {
        judge_key(identity, rows),
        judge_key(identity, rows[::-1]),
        judge_key(other, rows),
        verdict_key(identity, rows[0].model_dump_json(exclude={"id"})),
        verdict_key(other, rows[0].model_dump_json(exclude={"id"})),
    }
    assert len(keys) == 5
    assert judge_key(identity, rows) == judge_key(identity, iter(rows))


def test_a_judge_whose_source_file_is_missing_is_one_error(tmp_path: Path) -> None:
    """A class that a script on standard input defines has a file name, but no file."""
    judge = plugin_judge(tmp_path / "gone.py", "Gone")
    (tmp_path / "gone.py").unlink()
    with pytest.raises(StayalignedError, match="component 'gone': the source file of Gone can't be found"):
        identify_judge(judge, 0)


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.CSV", "rows.tsv", "rows.jsonl.gz", "rows", "data/rows", "why?.jsonl"]
)
@pytest.mark.parametrize("options", ["", "?where=a:b"])
def test_a_source_counts_by_its_content_whatever_its_kind(tmp_path: Path, monkeypatch, name: str, options: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name if "." in name else tmp_path / name / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    source = {"harmful_data": name + ("" if "?" in name else options)}
    path.write_text("a")
    first = identify(source, 0)
    path.write_text("another")
    assert identify(source, 0) != first != source


@pytest.mark.parametrize(
    "text", ["hf://owner/name?split=train", "and/or", "a sentence. ~nobody/x", "x" * 3000, "~nobody/x"]
)
def test_other_text_counts_as_it_is(text: str) -> None:
    assert identify({"system": text}, 0) == {"system": text}
