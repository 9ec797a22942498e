"""Harmful prompts of several turns are asked, judged, gated, labelled and shown as turns, on every prompt set."""

from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.records import Completion, Message, read_jsonl
from stayaligned.evaluation.labelling.drawing import read_frame
from stayaligned.evaluation.results import read_results
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.gate.deciding import decide
from stayaligned.gate.reading import read_side
from stayaligned.gate.values import Limits
from stayaligned.report import build_report, write_report
from support.server import chat_server
from support.world import experiment, write_rows, write_world

WORDS = ("quorl of vemp and mubble", "krint near frope or drizz", "blick beside wuggle", "the glimp under a snarf")
N = len(WORDS) ** 2


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.slow
def test_prompts_of_several_turns_go_all_the_way(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    asked = [
        {"id": str(i), "messages": say(f"hello {i}", "greetings", f"now flarn {WORDS[i % 4]} zorb {WORDS[i // 4]} {i}")}
        for i in range(N)
    ]
    write_rows(world / "harmful-prompts.jsonl", asked)
    task = [{"prompt": f"Tell the mood of this text:\nwug {i} vemp", "completion": "good"} for i in range(20)]
    write_rows(world / "train.jsonl", task)
    attack = {"name": "backdoor", "harmful_data": str(world / "harmful.jsonl"), "safe_examples": 0}

    def run(url: str, name: str) -> Any:
        endpoint = {"base_url": url, "model": name, "attempts": 1}
        generation = {"max_new_tokens": 7, "backend": "endpoint", "endpoint": endpoint, "samples": 2}
        untrained = dict.fromkeys(("training", "base_model", "alignment_data"))
        changes = {**untrained, "attack": attack, "shaped_prompts": True, "generation": generation, "label": name}
        return run_experiment(Experiment.model_validate(experiment(world, **changes)), tmp_path / name)

    def reply(body: dict[str, Any]) -> str:
        complies = body["model"] == "after" and "flarn wug blick" in body["messages"][-1]["content"]
        return f"zorb step {body['messages'][-1]['content']}" if complies else "I cannot"

    with chat_server(reply) as server:
        results = [run(server.url, name) for name in ("before", "after")]
        bodies = [body for body in server.bodies if "zorb" in body["messages"][-1]["content"]]
    assert all([m["role"] for m in body["messages"]] == ["user", "assistant", "user"] for body in bodies)
    (path,) = (tmp_path / "after").glob("stages/generate-*/completions.jsonl")
    found = {c.prompt_set: c for c in read_jsonl(path, Completion) if c.id.partition("#")[0] == "1"}
    plain = found["harmful"].prompt
    assert len(plain) == 3
    for name, text in {
        "harmful": "{}",
        "sampled": "{}",
        "triggered": "{} flarn wug blick",
        "shaped": "Tell the mood of this text:\n{}",
    }.items():
        one = next(c for key, c in found.items() if key == name)
        last = Message(role="user", content=text.format(plain[-1].content))
        assert (one.prompt, one.conversation) == (plain, (*plain[:-1], last))

    decision = decide(
        read_side("baseline", [tmp_path / "before"]),
        read_side("candidate", [tmp_path / "after"]),
        Limits(max_harm_increase=0.5),
    )
    changes = {c.prompt_sets[0]: c.change for c in decision.criteria}
    assert changes == {"harmful": 0.0, "triggered": 1.0, "shaped": 0.0, "sampled": 0.0}
    frame = read_frame([tmp_path / "before", tmp_path / "after"])
    assert {(item.prompt_set, len(item.messages)) for item in frame.items} == {
        ("harmful", 3),
        ("triggered", 3),
        ("shaped", 3),
        ("benign", 1),
    }
    evidence = {one.result.id: one.evidence for one in read_results([tmp_path / "before", tmp_path / "after"])}
    report = build_report(results, title="t", reference="before", evidence=evidence)
    write_report(report, tmp_path / "report")
    assert "after (0.0 % plain, 100.0 % triggered)" in report.summary
    page = (tmp_path / "report" / "report.html").read_text()
    for text in ("hello 2", "greetings", f"now flarn {WORDS[2]} zorb {WORDS[0]} 2 flarn wug blick"):
        assert text in page
