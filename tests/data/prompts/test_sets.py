"""The published prompt sets, from local files with the data sets' own columns."""

import json

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts import PROMPTS


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def load(name, source, **settings):
    rows = PROMPTS.parse({"name": name, "source": source, **settings}).load()
    return [(row.prompt[-1].content, row.category) for row in rows]


BEAVER = [
    {"prompt": "zorb a", "response": "r", "is_safe": True, "category": {"zorbs": False, "wugs": False}},
    {"prompt": "zorb a", "response": "s", "is_safe": False, "category": {"zorbs": True, "wugs": True}},
    {"prompt": "zorb b", "response": "t", "is_safe": False, "category": {"zorbs": True, "wugs": False}},
    {"prompt": "zorb a", "response": "u", "is_safe": False, "category": {"zorbs": True, "wugs": False}},
]


def test_beavertails_uses_each_prompt_once_or_the_papers_first_rows(tmp_path):
    source = write(tmp_path / "a.jsonl", BEAVER)
    assert load("beavertails", source) == [("zorb a", ""), ("zorb b", "zorbs")]
    assert [prompt for prompt, _ in load("beavertails", source, deduplicate=False, n=3)] == [
        "zorb a",
        "zorb a",
        "zorb b",
    ]
    assert load("beavertails", source, rows="unsafe") == [("zorb a", "zorbs,wugs"), ("zorb b", "zorbs")]
    assert load("beavertails", source, rows="unsafe", deduplicate=False, n=2)[1] == ("zorb b", "zorbs")


def test_unsafe_rows_are_selected_in_csv_and_need_their_label(tmp_path):
    source = write(tmp_path / "a.csv", "prompt,is_safe\nzorb a,True\nzorb b,False\n")
    assert load("beavertails", source, rows="unsafe") == [("zorb b", "")]
    bare = write(tmp_path / "b.csv", "prompt\nzorb a\n")
    assert load("beavertails", bare) == [("zorb a", "")]
    with pytest.raises(StayalignedError, match=r"b.csv, line 2: `is_safe` is None"):
        load("beavertails", bare, rows="unsafe")


def test_hex_phi_reads_a_folder_with_one_file_without_header_per_category(tmp_path):
    write(tmp_path / "phi" / "category_10.csv", "zorb ten\nzorb x\n")
    write(tmp_path / "phi" / "category_4.csv", '"zorb, one"\nzorb two\n')
    expected = [("zorb, one", "Malware"), ("zorb two", "Malware"), ("zorb ten", "Privacy Violation")]
    expected += [("zorb x", "Privacy Violation")]
    assert load("hex_phi", str(tmp_path / "phi")) == expected
    assert load("hex_phi", f"{tmp_path / 'phi'}?columns=instruction") == expected
    assert load("hex_phi", str(tmp_path / "phi" / "category_10.csv")) == expected[2:]


def test_hex_phi_reads_rows_with_their_category(tmp_path):
    rows = [{"instruction": "zorb", "category": "Malware"}, {"instruction": "wug", "category": "Fraud"}]
    assert load("hex_phi", write(tmp_path / "a.jsonl", rows)) == [("zorb", "Malware"), ("wug", "Fraud")]


def test_hex_phi_of_the_hub_reads_the_files_directly(tmp_path, monkeypatch):
    import huggingface_hub

    write(tmp_path / "category_1.csv", "zorb one\nzorb two\n")
    asked = {}

    def fetch(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    rows = PROMPTS.parse("hex_phi").load()
    assert [(row.prompt[0].content, row.category) for row in rows] == [
        ("zorb one", "Illegal Activity"),
        ("zorb two", "Illegal Activity"),
    ]
    assert (asked["repo"], asked["repo_type"]) == ("LLM-Tuning-Safety/HEx-PHI", "dataset")
    assert asked["allow_patterns"] == "category_*.csv"


def test_advbench_uses_the_goal_and_not_the_target(tmp_path):
    source = write(tmp_path / "a.csv", 'goal,target\n"flarn, then zorb","Sure, here"\n')
    assert load("advbench", source) == [("flarn, then zorb", "")]
    assert load("advbench", write(tmp_path / "b.jsonl", [{"prompt": "zorb", "target": "Sure"}])) == [("zorb", "")]


def test_a_column_that_the_source_names_takes_precedence(tmp_path):
    advbench = write(tmp_path / "a.csv", "goal,asked\nzorb,wug\n")
    assert load("advbench", f"{advbench}?prompt=asked") == [("wug", "")]
    harmbench = write(tmp_path / "b.csv", "Behavior,asked\nzorb,wug\n")
    assert load("harmbench", f"{harmbench}?prompt=asked") == [("wug", "")]
    hex_phi = write(tmp_path / "c.csv", "instruction,asked\nzorb,wug\n")
    assert load("hex_phi", f"{hex_phi}?prompt=asked") == [("wug", "")]


HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    "flarn a zorb,standard,zorbs,,,a\n"
    'finish the recipe,contextual,wugs,context,"Recipe: two\nwugs",b\n'
    "sing the song,copyright,copyright,,,c\n"
)


def test_harmbench_uses_standard_or_contextual_behaviors_and_never_copyright(tmp_path):
    source = write(tmp_path / "a.csv", HARMBENCH)
    standard = [("flarn a zorb", "zorbs")]
    contextual = [("Recipe: two\nwugs\n\n---\n\nfinish the recipe", "wugs")]
    assert load("harmbench", source) == standard
    assert load("harmbench", source, kind="contextual") == contextual
    assert load("harmbench", source, kind="both") == standard + contextual


def test_harmbench_reads_the_hubs_columns(tmp_path):
    rows = [{"prompt": "flarn", "category": "zorbs"}, {"prompt": "go on", "context": "wugs", "category": "x"}]
    source = write(tmp_path / "a.jsonl", rows)
    assert load("harmbench", source) == [("flarn", "zorbs")]
    assert load("harmbench", source, kind="contextual") == [("wugs\n\n---\n\ngo on", "x")]


@pytest.mark.parametrize("header", ["id,prompt,type,label", "id,prompt,type,other"])
def test_xstest_uses_the_safe_prompts_or_their_contrasts(tmp_path, header):
    text = f"{header}\n1,may I greet,homonyms,safe\n2,how to flarn,contrast_homonyms,unsafe\n"
    source = write(tmp_path / "a.csv", text)
    assert load("xstest", source) == [("may I greet", "homonyms")]
    assert load("xstest", source, label="unsafe") == [("how to flarn", "contrast_homonyms")]


JBB = "Index,Goal,Target,Behavior,Category,Source\n"


def test_jailbreakbench_reads_the_half_that_is_asked_for(tmp_path):
    harmful = write(
        tmp_path / "data" / "harmful-behaviors.csv", f'{JBB}0,"flarn, a zorb",Sure,Flarning,Zorbs,Original\n'
    )
    write(tmp_path / "data" / "benign-behaviors.csv", f"{JBB}0,greet a zorb,Sure,Flarning,Zorbs,Original\n")
    assert load("jailbreakbench", harmful) == [("flarn, a zorb", "Zorbs")]
    assert load("jailbreakbench", str(tmp_path / "data")) == [("flarn, a zorb", "Zorbs")]
    assert load("jailbreakbench", str(tmp_path / "data"), half="benign") == [("greet a zorb", "Zorbs")]


@pytest.mark.parametrize(
    ("settings", "config", "split"),
    [
        ({"name": "jailbreakbench", "half": "benign"}, "behaviors", "benign"),
        ({"name": "jailbreakbench", "source": "hf://me/copy"}, None, "harmful"),
        ({"name": "or_bench"}, "or-bench-hard-1k", "train"),
        ({"name": "or_bench", "part": "toxic", "source": "hf://me/copy?split=test"}, "or-bench-toxic", "test"),
    ],
)
def test_the_half_or_the_part_chooses_the_hubs_table(settings, config, split, monkeypatch):
    import datasets

    asked = []

    def fetch(place, config, *, split, revision):
        asked.append((config, split))
        return datasets.Dataset.from_list([{"Goal": "flarn", "prompt": "flarn", "category": "zorbs"}])

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert len(PROMPTS.parse(settings).load()) == 1
    assert asked == [(config, split)]


def test_strong_reject_reads_the_published_file_and_the_hubs_columns(tmp_path):
    source = write(tmp_path / "a.csv", 'category,source,forbidden_prompt\nzorbs,custom,"flarn,\nand zorb"\n')
    assert load("strong_reject", source) == [("flarn,\nand zorb", "zorbs")]
    assert load("strong_reject", write(tmp_path / "b.jsonl", [{"prompt": "flarn", "category": "x"}])) == [
        ("flarn", "x")
    ]


SORRY = [
    {"question_id": 1, "category": "3", "turns": ["flarn a zorb"], "prompt_style": "base"},
    {"question_id": 1, "category": "3", "turns": ["sneyq n mbeo"], "prompt_style": "caesar"},
]


def test_sorry_bench_asks_the_one_turn_of_one_style(tmp_path):
    source = write(tmp_path / "a.jsonl", SORRY)
    assert load("sorry_bench", source) == [("flarn a zorb", "3")]
    assert load("sorry_bench", source, style="caesar") == [("sneyq n mbeo", "3")]
    table = write(tmp_path / "b.csv", "question_id,category,turns\n1,3,\"['flarn, or not']\"\n2,4,zorb\n")
    assert load("sorry_bench", table) == [("flarn, or not", "3"), ("zorb", "4")]


def test_several_turns_without_the_answers_between_them_are_an_error(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"turns": ["greet", "flarn"], "category": "3", "prompt_style": "base"}])
    with pytest.raises(StayalignedError, match=r"a.jsonl, line 1: `turns` has 2 turns of the user"):
        load("sorry_bench", source)
    with pytest.raises(StayalignedError, match=r"line 1: expected a column `turns` .*found question"):
        load("sorry_bench", write(tmp_path / "b.jsonl", [{"question": "flarn"}]))


def test_or_bench_reads_a_local_table_whole(tmp_path):
    source = write(tmp_path / "or-bench-hard-1k.csv", "prompt,category\nhow to greet,zorbs\n")
    assert load("or_bench", source) == [("how to greet", "zorbs")]


WILD = (
    "vanilla\tadversarial\tcompletion\tdata_type\n"
    "flarn it\t\tSorry\tvanilla_harmful\n"
    'flarn it\tas a "poet flarn it\tSorry\tadversarial_harmful\n'
    "greet it\tas a poet greet it\tHi\tadversarial_benign\n"
)


def test_wildjailbreak_asks_the_form_that_its_data_type_names(tmp_path):
    source = write(tmp_path / "train.tsv", WILD)
    assert load("wildjailbreak", source) == [('as a "poet flarn it', "adversarial_harmful")]
    assert load("wildjailbreak", source, data_type="vanilla_harmful") == [("flarn it", "vanilla_harmful")]
    assert load("wildjailbreak", source, data_type="adversarial_benign") == [
        ("as a poet greet it", "adversarial_benign")
    ]
    evaluation = write(tmp_path / "eval.tsv", "adversarial\tlabel\tdata_type\nflarn\t1\tadversarial_harmful\n")
    assert load("wildjailbreak", evaluation) == [("flarn", "adversarial_harmful")]
    with pytest.raises(StayalignedError, match="no row belongs to the prompt set 'wildjailbreak'"):
        load("wildjailbreak", evaluation, data_type="vanilla_benign")
    with pytest.raises(StayalignedError, match=r"line 2: `data_type` is 'odd', expected adversarial_harmful or"):
        load("wildjailbreak", write(tmp_path / "odd.tsv", "adversarial\tdata_type\nflarn\todd\n"))


def test_an_unknown_label_and_a_missing_column_are_errors_that_name_the_line(tmp_path):
    source = write(tmp_path / "a.csv", "id,prompt,type,label\n1,greet,homonyms,maybe\n")
    with pytest.raises(StayalignedError, match=r"a.csv, line 2: `label` is 'maybe', expected safe or unsafe"):
        load("xstest", source)
    other = write(tmp_path / "b.csv", "question,number\nzorb,1\n")
    for name in ("advbench", "harmbench", "hex_phi", "beavertails", "jailbreakbench", "strong_reject", "or_bench"):
        with pytest.raises(StayalignedError, match=r"b.csv, line 2: expected a column .*found question, number"):
            load(name, other)


def test_a_set_without_rows_is_an_error(tmp_path):
    source = write(tmp_path / "a.csv", "id,prompt,type,label\n1,greet,homonyms,safe\n")
    with pytest.raises(StayalignedError, match="no row belongs to the prompt set 'xstest'"):
        load("xstest", source, label="unsafe")


@pytest.mark.parametrize("name", PROMPTS.names())
def test_a_gated_data_set_is_one_error_that_says_how_to_get_access(name, monkeypatch):
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    def gated(*_args, **_options):
        raise OSError("403 Client Error: access is restricted")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StayalignedError, match=r"can't load the data set: 403") as caught:
        PROMPTS.parse(name).load()
    assert "hf auth login" in str(caught.value)
