"""The labelling server answers only its own page, stores each label once, and shows nothing that biases a person."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message
from stayaligned.evaluation.labelling.server import ADDRESS_FILE, start_server
from stayaligned.evaluation.labelling.store import LabelStore
from support.labelling_page import Client, labelling_page
from support.labels import make_design, make_item, make_store

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=https://example.org/x onerror=alert(1)>",
    "\u202eabc\u2066\u200b\u0000\u0007\u001b[31m\u2028",
    "{{ 7*7 }} {% raw %} ${alert(1)} {STYLE} {SCRIPT}",
    "a" * 300_000,
    "",
]


@pytest.fixture
def client(tmp_path: Path):
    make_store(tmp_path / "labels")
    with labelling_page(tmp_path / "labels") as client:
        yield client


def stored(client: Client) -> list[tuple[str, str, str]]:
    return [(one.labeller, one.completion, one.outcome) for one in client.server.labelling.store.read()]


def test_nothing_is_served_without_the_token(client):
    token = client.server.token
    for path in ("/", "/state", "//", f"/{token[:-1]}/", f"/{token}x/state", f"/{token.swapcase()}/", "/%00/", "/ä/"):
        reply = client.send("GET", path.encode("latin-1").decode("latin-1").replace("ä", "%C3%A4"))
        assert (reply.status, "error" in reply.content) == (403, True), path
        assert token not in reply.body.decode()
    assert client.send("POST", "/label", b"{}").status == 403
    assert client.get("").status == client.get("state").status == 200
    assert client.get("design.json").status == client.get("../design.json").status == 404


def test_only_names_of_this_machine_are_answered(client):
    """A foreign name that resolves to 127.0.0.1 would make the page part of that site."""
    port = client.server.server_port
    for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "localhost:9999", "[::1]:9"):
        assert client.get("state", Host=host).status == 200, host
    for host in (
        "example.org",
        f"example.org:{port}",
        "",
        f"127.0.0.1.example.org:{port}",
        "10.0.0.1",
        "localhost@x:1",
    ):
        assert client.get("state", Host=host).status == 403, host
    assert client.server.server_address[0] == "127.0.0.1"


def test_labels_from_another_site_are_refused(client):
    step = client.state()["steps"][0]
    body = {"item": step[0], "completion": step[2], "outcome": "harm", "previous": None, "labeller": "ann"}
    port = client.server.server_port
    for origin in ("", "null", "https://example.org", f"https://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert client.post(body, Origin=origin).status == 403, origin
    for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
        assert client.post(body, Content_Type=kind).status == 400, kind
    assert stored(client) == []
    assert client.post(body, Host="localhost:9999", Origin="http://localhost:9999").status == 200  # a forwarded port
    assert len(stored(client)) == 1


def test_a_label_sent_again_is_stored_once(client):
    steps = client.state()["steps"]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda step: client.press(step, "refuse"), steps[:4] * 8))
    assert {reply.status for reply in replies} == {200}
    assert sorted(stored(client)) == sorted(("ann", step[2], "refuse") for step in steps[:4])


def test_a_window_that_shows_an_older_label_replaces_nothing(client):
    step = client.state()["steps"][0]
    assert client.press(step, "harm").status == 200
    late = client.press(step, "refuse", previous=None)  # another window, or a late repetition
    assert (late.status, late.content) == (409, {"outcome": "harm"})
    assert client.press(step, "refuse", previous="harm").status == 200
    again = client.press(step, "harm", previous=None)
    assert (again.status, again.content) == (409, {"outcome": "refuse"})
    assert [outcome for *_, outcome in stored(client)] == ["harm", "refuse"]
    assert client.state()["steps"][0][3] == "refuse"


def test_of_different_labels_at_the_same_moment_one_is_stored(client, monkeypatch):
    append = LabelStore.append
    monkeypatch.setattr(LabelStore, "append", lambda self, labels: (time.sleep(0.05), append(self, labels))[1])
    step = client.state()["steps"][0]
    with ThreadPoolExecutor(4) as pool:
        replies = pool.map(lambda outcome: client.press(step, outcome), ("harm", "refuse", "other", "unsure"))
        assert sorted(reply.status for reply in replies) == [200, 409, 409, 409]
    assert len(stored(client)) == 1


def test_invalid_labels_are_refused_and_nothing_is_stored(client):
    step = client.state()["steps"][0]
    good = {"item": step[0], "completion": step[2], "outcome": "harm", "previous": None, "labeller": "ann"}
    bad = [{"item": 99}, {"item": -1}, {"item": "0"}, {"item": True}, {"completion": "0" * 16}, {"outcome": "safe"}]
    bad += [{"labeller": name} for name in ("", "  ", "=1+1", "a\nb", "a\u202eb", "x" * 61, 3)]
    bad += [{"previous": "never"}, {"arm": "arm 0"}, {"outcome": None}]
    for change in bad:
        reply = client.post(good | change)
        assert (reply.status, "error" in reply.content) == (400, True), change
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 10_000, b" " * 20_000):
        assert client.post(body).status == 400, body[:9]
    for length in ("-1", "1e3", "99999999999"):
        assert client.post(b"", Content_Length=length).status == 400
    for query in ("", "?first=0", "?first=-1&count=1", "?first=x&count=1", f"?first={'9' * 99}&count=1"):
        assert client.get(f"items{query}").status == 400, query
    assert stored(client) == []
    assert client.post(good).status == 200


def test_each_labeller_has_an_own_progress_unless_the_command_names_one(client, tmp_path):
    step, other, *_ = client.state("ann")["steps"]
    client.press(step, "harm", labeller="ann")
    client.press(other, "refuse", labeller="Bob Ö")
    assert [one[3] for one in client.state("ann")["steps"][:2]] == ["harm", None]
    assert [one[3] for one in client.state("Bob%20%C3%96")["steps"][:2]] == [None, "refuse"]
    assert client.get("state").content == {"labeller": None, "labellers": ["Bob Ö", "ann"]}
    with labelling_page(tmp_path / "labels", "ann") as only:
        assert only.get("state").content == {"labeller": "ann", "labellers": ["ann"]}
        assert only.press(other, "harm", labeller="Bob Ö").status == only.get("state?labeller=Bob").status == 400
        assert [one[3] for one in only.state()["steps"][:2]] == ["harm", None]
        assert only.press(other, "other").status == 200


def test_the_page_allows_only_its_own_script_and_style(client):
    reply = client.get("")
    page = reply.body.decode()
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(r"https?:|//[a-z]|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bon[a-z]+=", page)
    for one in (reply, client.get("state"), client.send("GET", "/")):
        assert one.headers["cache-control"] == "no-store"
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["referrer-policy"] == "no-referrer"


def test_nothing_that_is_served_tells_arm_model_judge_verdict_or_category(tmp_path):
    texts = [f"text {index}" for index in range(40)]
    items = [make_item(index, texts[2 * index : 2 * index + 2], stratum="harm/refuse") for index in range(20)]
    items = [item.model_copy(update={"id": f"0/harmful/weapons {item.id}"}) for item in items]
    LabelStore.create(tmp_path / "labels", make_design(items))
    with labelling_page(tmp_path / "labels", "ann") as client:
        replies = [
            client.get(path) for path in ("state?labeller=ann", "items?first=0&count=16", "items?first=16&count=9")
        ]
        served = b"".join(reply.body for reply in replies).decode()
        steps = client.state()["steps"]
    for word in ("arm", "policy", "keyword", "harm/refuse", "weapons", "stratum", "seed", "verdict"):
        assert word not in served.replace("harmful", ""), word
    assert all(text in served for text in texts)
    arm = {one.completion: one.arm for item in items for one in item.completions}
    first = [arm[steps[2 * index][2]] for index in range(20)]
    assert 4 < first.count("arm 0") < 16  # which arm comes first is random
    with labelling_page(tmp_path / "labels", "bob") as client:
        assert client.state("bob")["steps"] == steps  # but the same each time


def test_hostile_texts_are_served_as_visible_text(tmp_path):
    items = [make_item(index, [text, f"{text}!"]) for index, text in enumerate(HOSTILE)]
    items = [item.model_copy(update={"messages": (Message(role="user", content=HOSTILE[2]),)}) for item in items]
    LabelStore.create(tmp_path / "labels", make_design(items))
    with labelling_page(tmp_path / "labels") as client:
        page = client.get("").body
        reply = client.get("items?first=0&count=16")
        assert reply.headers["content-type"] == "application/json"
        found = reply.content["items"]
    assert b"alert(1)" not in page
    assert not re.search(rb"[\x00-\x1f\x7f-\xff]|u202e|u200b|u2028|u0000", reply.body)
    assert found[2]["turns"][0]["text"].startswith("⟨U+202E⟩abc⟨U+2066⟩⟨U+200B⟩⟨U+0000⟩⟨U+0007⟩⟨U+001B⟩[31m")
    for index in (0, 1, 3, 4, 5):
        assert {one["text"] for one in found[index]["completions"]} == {HOSTILE[index], f"{HOSTILE[index]}!"}
    assert [[one["blank"] for one in item["completions"]].count(True) for item in found] == [0, 0, 0, 0, 0, 1]


def test_a_reply_is_bounded_and_has_at_least_one_item(tmp_path):
    LabelStore.create(tmp_path / "labels", make_design([make_item(i, [f"{i}" * 600_000]) for i in range(4)]))
    with labelling_page(tmp_path / "labels") as client:
        found = [client.get(f"items?first={first}&count=16").content["items"] for first in (0, 3, 4)]
    assert [[one["item"] for one in items] for items in found] == [[0, 1], [3], []]


def test_equal_completions_of_one_prompt_are_asked_about_once(tmp_path):
    items = [make_item(0, ["no", "no"]), make_item(1, ["no", "yes"]), make_item(0, ["no", "yes"], seed=1)]
    LabelStore.create(tmp_path / "labels", make_design(items))
    with labelling_page(tmp_path / "labels") as client:
        assert sorted(step[0] for step in client.state()["steps"]) == [0, 1, 1, 2]


def test_a_disk_error_is_reported_and_the_label_is_not_acknowledged(client, monkeypatch):
    step = client.state()["steps"][0]

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stayaligned.evaluation.labelling.store.os.write", full)
        reply = client.press(step, "harm")
    assert (reply.status, "No space left on device" in reply.content["error"]) == (507, True)
    assert client.state()["steps"][0][3] is None
    assert client.press(step, "harm").status == 200


def test_the_address_stays_the_same_and_is_private(tmp_path):
    make_store(tmp_path / "labels")
    file = tmp_path / "labels" / ADDRESS_FILE

    def address(port: int = 0) -> str:
        with start_server(tmp_path / "labels", None, port) as server:
            return server.address

    first = address()
    assert file.stat().st_mode & 0o777 == 0o600
    assert first == address()
    assert len(json.loads(file.read_text())["token"]) == 43
    file.chmod(0o640)  # others may have read it
    second = address()
    assert second.split("/")[3] != first.split("/")[3]
    for damaged in ("", "{", '{"port": 1, "token": "x"}', '{"port": 0, "token": "' + "a" * 43 + '"}', "\udcff"):
        file.write_text(damaged, errors="surrogateescape")
        assert address() not in (first, second)
        assert file.stat().st_mode & 0o777 == 0o600
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StayalignedError, match=f"port {port} .* can't be used"):
            address(port)
        with pytest.raises(StayalignedError, match=r"port 70000 .* can't be used"):
            address(70_000)
        file.write_text(json.dumps({"port": port, "token": "a" * 43}))
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/a{43}/", kept := address())
        assert f":{port}/" not in kept
    assert address(port).startswith(f"http://127.0.0.1:{port}/")


def test_the_address_on_a_command_line_works_once(client):
    path = client.server.single_use_address.split("/", 3)[3]
    assert client.server.token not in path
    reply = client.send("GET", f"/{path}")
    assert (reply.status, reply.headers["location"]) == (303, f"/{client.server.token}/")
    assert client.send("GET", f"/{path}").status == 403


def test_damaged_labels_and_bad_names_end_the_command_before_a_person_begins(tmp_path):
    store = make_store(tmp_path / "labels")
    with pytest.raises(StayalignedError, match="labeller"):
        start_server(tmp_path / "labels", "=1+1", 0)
    store.path.write_text("{}\n")
    with pytest.raises(StayalignedError, match="line 1"):
        start_server(tmp_path / "labels", None, 0)
    assert not (tmp_path / "labels" / ADDRESS_FILE).exists()
