"""The labelling page's server: who comes in, what people and machines get, what is refused, in one line each."""

from __future__ import annotations

import http.client
import json
import re
import socket
import uuid
from pathlib import Path

import pytest
from reference.labelling import Clock
from reference.served import call, served

from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.project import Criterion, Project
from rlhf.collection.store import Candidate, Item, Plan, Store

PROJECT = Project("Helpful answers", "# Be fair", (Criterion("tone", ("rude", "plain", "kind")),), ("unsafe",))
SERVER_TOKEN = "0123456789abcdef"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.set_plan(Plan(seed=3, gold_share=0.0))
        yield store


@pytest.fixture
def url(store):
    config = LabelConfig()
    with served(create_app(store, PROJECT, config, invitations=SERVER_TOKEN), config) as url:
        yield url


def items(count: int, k: int = 3) -> list[Item]:
    turn = [{"role": "user", "content": "What is {}?"}]
    return [
        Item(
            [{**turn[0], "content": f"What is {n}?"}],
            tuple(Candidate(f"answer {n}.{i}", policy=f"policy {i}", fingerprint="f" * 8, seed=i) for i in range(k)),
            columns={"secret_answer": n},
        )
        for n in range(count)
    ]


class Person:
    """A browser without the page: what it holds is the cookie."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        status, said, headers = call(url, "/api/enter", {"token": token})
        assert status == 200, said
        self.cookie = headers["Set-Cookie"].partition(";")[0]

    def ask(self, path: str, body=None, **headers: str):
        return call(self.url, path, body, Cookie=self.cookie, **headers)

    def next(self):
        status, said, _ = self.ask("/api/next", {})
        assert status == 200, said
        return said["tasks"][0] if said["tasks"] else None

    def judge(self, task, **further):
        ranks = {str(shown["id"]): place for place, shown in enumerate(task["candidates"])}
        answer = {"assignment": task["assignment"], "submission": uuid.uuid4().hex, "ranks": ranks, **further}
        return self.ask("/api/judgments", answer)


# -- who comes in ------------------------------------------------------------------------------------------


def test_an_invitation_becomes_a_cookie_that_no_script_reads_and_no_other_site_sends(store, url):
    token = store.invite("anna")
    status, said, headers = call(url, "/api/enter", {"token": token})
    assert (status, said) == (200, {"annotator": "anna"})
    name, _, rest = headers["Set-Cookie"].partition("=")
    value, *attributes = re.split(r"; ", rest)
    assert (value, {a.lower() for a in attributes}) == (
        token,
        {"httponly", "path=/", "samesite=strict", "max-age=2592000"},
    )
    assert call(url, "/api/project", Cookie=f"{name}={token}")[1]["annotator"] == "anna"
    behind_tls = call(url, "/api/enter", {"token": token}, Origin=url.replace("http:", "https:"))
    assert "secure" in behind_tls[2]["Set-Cookie"].lower()


def test_two_stores_on_one_machine_use_cookies_of_their_own(tmp_path):
    names = set()
    for n in range(2):
        with Store(tmp_path / f"{n}.db") as store:
            token, config = store.invite("anna"), LabelConfig()
            with served(create_app(store, Project(), config), config) as url:
                names.add(call(url, "/api/enter", {"token": token})[2]["Set-Cookie"].partition("=")[0])
    assert len(names) == 2


def test_the_store_holds_no_token(store, url):
    token = store.invite("anna")
    assert Person(url, token).ask("/api/project")[0] == 200
    held = b"".join(path.read_bytes() for path in store.path.parent.glob("labels.db*"))
    assert b"anna" in held
    assert token.encode() not in held


def test_nobody_enters_without_an_invitation(store, url):
    store.invite("anna")
    old = store.invite("ben")
    store.invite("ben")  # a new link ends the old one
    tried = ("Bearer nonsense", f"Bearer {old}", "Basic x", "Bearer " + "\xe9" * 9, "Bearer", f"Bearer {'a' * 999}")
    for name in ("project", "next", "judgments", "skip", "renew", "back"):
        for headers in ({}, {"Cookie": "rlhf_label=x"}, *({"Authorization": header} for header in tried)):
            status, said, answered = call(url, f"/api/{name}", None if name == "project" else {}, **headers)
            assert status == 401, (name, headers, said)
            assert said == {"error": "no invitation, or one that has ended; ask for a new link"}
            assert answered["WWW-Authenticate"] == "Bearer"


def test_a_cookie_does_not_serve_another_sites_page(store, url):
    anna = Person(url, store.invite("anna"))
    for site in ("cross-site", "same-site"):  # another port of this machine is the same site
        assert anna.ask("/api/next", {}, Sec_Fetch_Site=site)[0] == 403
    assert anna.ask("/api/next", {}, Origin="http://evil.example")[0] == 403
    assert anna.ask("/api/project", Host="evil.example")[0] == 403
    # what a form of another page could send without asking: no JSON
    assert anna.ask("/api/next", "{}", Content_Type="text/plain")[0] == 415
    assert anna.ask("/api/next", "{}", method="POST")[0] == 415
    assert anna.ask("/api/next", {}, Sec_Fetch_Site="same-origin")[0] == 200


def test_who_leaves_is_out_and_the_link_lets_them_in_again(store, url):
    token = store.invite("anna")
    gone = Person(url, token).ask("/api/leave", {})[2]["Set-Cookie"]
    assert "max-age=0" in gone.lower()
    Person(url, token)


def test_only_the_servers_token_invites(store, url):
    asked = {"name": "grader", "kind": "model"}
    assert call(url, "/api/invite", asked)[0] == 401
    assert call(url, "/api/invite", asked, Authorization=f"Bearer {store.invite('anna')}")[0] == 401
    status, said, _ = call(url, "/api/invite", asked, Authorization=f"Bearer {SERVER_TOKEN}")
    assert status == 200
    assert (found := store.annotator_of(said["token"])) is not None
    assert (found.name, found.kind) == ("grader", "model")
    assert call(url, "/api/invite", {"name": "x", "kind": "cat"}, Authorization=f"Bearer {SERVER_TOKEN}")[0] == 400
    config = LabelConfig()
    with served(create_app(store, PROJECT, config), config) as other:
        assert call(other, "/api/invite", asked, Authorization="Bearer ")[0] == 401


# -- the page's files --------------------------------------------------------------------------------------


def test_every_file_forbids_what_is_not_its_own(url):
    types = {"/": "text/html", "/label.css": "text/css", "/label.js": "text/javascript", "/view.js": "text/javascript",
             "/ranking.js": "text/javascript", "/server.js": "text/javascript"}  # fmt: skip
    for path, kind in types.items():
        status, text, headers = call(url, path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert banned not in text, path
        if kind == "text/html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|https?://", text)


def test_the_page_names_every_element_that_its_script_looks_for():
    page = Path("rlhf/collection/page")
    root = Path(__file__).resolve().parents[2] / page
    ids = re.findall(r'\bid="(\w+)"', (root / "label.html").read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))
    script = (root / "label.js").read_text(encoding="utf-8")
    named = set(re.findall(r'byId\("(\w+)"\)', script)) | {"rewriting", "commenting", "rewrite", "comment"}
    buttons = re.search(r"const BUTTONS = \{(.*?)\}", script, re.DOTALL)
    named |= set(re.findall(r"(\w+):", buttons[1])) if buttons else set()
    assert named <= set(ids)


def test_unknown_paths_and_methods_are_one_line(url):
    assert call(url, "/nothing")[:2] == (404, {"error": "GET /nothing: Not Found"})
    assert call(url, "/label.js/")[0] == 404  # no redirect to wherever Host says
    assert call(url, "/api/next")[:2] == (405, {"error": "GET /api/next: Method Not Allowed"})
    assert call(url, "/health")[:2] == (200, {"status": "ok"})
    assert call(url, "/../app.py")[0] == 404


# -- what people get and give ------------------------------------------------------------------------------


def test_a_person_sees_texts_in_the_order_drawn_and_nothing_of_where_they_came_from(store, url):
    store.add_items(items(1, k=5))
    anna = Person(url, store.invite("anna"))
    task = anna.next()
    assert set(task) == {"assignment", "prompt", "candidates", "lease_until", "answer", "draft", "renew_seconds"}
    assert task["prompt"] == [{"role": "user", "content": "What is 0?"}]
    held = store.task("anna", task["assignment"])
    assert [shown["text"] for shown in task["candidates"]] == [shown.text for shown in held.candidates]
    assert [shown["text"] for shown in task["candidates"]] != sorted(shown["text"] for shown in task["candidates"])
    assert all(set(shown) == {"id", "text"} for shown in task["candidates"])
    written = json.dumps(anna.ask("/api/next", {})[1])
    for hidden in ("policy", "secret_answer", "fingerprint", "seed"):
        assert hidden not in written


def test_a_judgment_is_stored_as_it_was_given(store, url):
    store.add_items(items(1))
    anna = Person(url, store.invite("anna"))
    task = anna.next()
    ids = [shown["id"] for shown in task["candidates"]]
    ranks = {str(ids[0]): 2, str(ids[1]): 1, str(ids[2]): 2}
    status, said, _ = anna.judge(
        task, ranks=ranks, ratings={str(ids[1]): {"tone": 3}}, rewrite="better", rewrite_of=ids[1], flags=["unsafe"],
        comment="so so", seconds=12.5, guideline=anna.ask("/api/project")[1]["guideline"],
    )  # fmt: skip
    assert status == 200
    (stored,) = store.judgments()
    assert stored.id == said["judgment"]
    shown = [stored.order.index(n) for n in range(3)]  # a stored candidate's place in the order shown
    assert stored.ranks == tuple([2.0, 1.0, 2.0][place] for place in shown)
    assert [dict(rated) for rated in stored.ratings] == [{"tone": 3} if place == 1 else {} for place in shown]
    assert (stored.rewrite, stored.flags, stored.comment, stored.seconds) == ("better", ("unsafe",), "so so", 12.5)
    assert shown[stored.rewrite_of] == 1
    guideline = store.guideline(stored.guideline)
    assert guideline is not None
    assert guideline.text.startswith("# Be fair")
    assert "tone" in guideline.text  # another criterion is another guideline
    assert anna.next() is None


def test_a_repeated_submission_is_stored_once_and_an_edit_supersedes(store, url):
    store.add_items(items(1))
    anna = Person(url, store.invite("anna"))
    task = anna.next()
    submission = uuid.uuid4().hex
    first = anna.judge(task, submission=submission)[1]
    assert anna.judge(task, submission=submission)[1] == first
    edit = anna.judge(task)[1]
    assert edit != first
    assert [(one.id, one.supersedes) for one in store.judgments(superseded=True)] == [
        (first["judgment"], None), (edit["judgment"], first["judgment"]),
    ]  # fmt: skip


def test_back_walks_through_what_was_judged_the_last_first(store, url):
    store.add_items(items(3))
    anna = Person(url, store.invite("anna"))
    assert anna.ask("/api/back", {})[1] == {"task": None}
    done = []
    for _ in range(2):
        task = anna.next()
        anna.judge(task, comment=f"about {task['assignment']}")
        done.append(task)
    current = anna.next()
    before = None
    for task in reversed(done):
        earlier = anna.ask("/api/back", {"before": before})[1]["task"]
        before = earlier["assignment"]
        assert earlier["candidates"] == task["candidates"]  # in the same order
        assert earlier["answer"]["comment"] == f"about {task['assignment']}"
        assert earlier["answer"]["ranks"] == {str(c["id"]): float(n) for n, c in enumerate(task["candidates"])}
        assert earlier["draft"] == task["draft"]
    assert anna.ask("/api/back", {"before": before})[1] == {"task": None}
    assert anna.next() == current  # which is still held
    assert len({task["draft"] for task in [*done, current]}) == 3


def test_who_skips_does_not_get_it_again_and_others_do(store, url):
    store.add_items(items(1))
    anna, ben = (Person(url, store.invite(name)) for name in ("anna", "ben"))
    task = anna.next()
    assert ben.next() is None
    assert anna.ask("/api/skip", {"assignment": task["assignment"], "reason": "unsafe; odd"})[0] == 200
    assert anna.next() is None
    assert ben.next()["prompt"] == task["prompt"]


@pytest.mark.parametrize(("lease", "renewed"), [(240, 80), (1800, 300), (1, 1)])
def test_the_page_hears_when_to_renew_the_lease(store, url, lease, renewed):
    """After a third of it, so that two answers may be lost; a long one after five minutes."""
    store.set_plan(Plan(lease_seconds=lease))
    store.add_items(items(1))
    assert Person(url, store.invite("anna")).next()["renew_seconds"] == renewed


def test_an_item_that_went_to_others_is_told_from_a_mistake(store, url, clock):
    store.add_items(items(1))
    anna, ben = (Person(url, store.invite(name)) for name in ("anna", "ben"))
    task = anna.next()
    clock.now += store.plan.lease_seconds - 1
    assert anna.ask("/api/renew", {"assignment": task["assignment"]})[1] == {"held": True}
    clock.now += store.plan.lease_seconds - 1
    assert ben.next() is None  # still anna's
    clock.now += 2
    assert ben.next() is not None
    assert anna.ask("/api/renew", {"assignment": task["assignment"]})[1] == {"held": False}
    status, said, _ = anna.judge(task)
    assert status == 409
    assert "went to others" in said["error"]
    assert anna.judge({**task, "assignment": 10**6})[0] == 400


def test_progress(store, url):
    store.add_items(items(3), overlap=2)
    anna, ben = (Person(url, store.invite(name)) for name in ("anna", "ben"))
    anna.judge(anna.next())
    assert anna.ask("/api/next", {})[1]["progress"] == {"done": 1, "skipped": 0, "left": 2}
    assert ben.ask("/api/next", {})[1]["progress"] == {"done": 0, "skipped": 0, "left": 3}


# -- mistakes ----------------------------------------------------------------------------------------------


MISTAKES = (
    ("/api/next", b"{", "the body is no JSON"),
    ("/api/next", b"[" * 100_000, "the body is no JSON"),
    ("/api/next", b"\xff", "the body is no JSON"),
    ("/api/next", b"[]", "the body is a list; send an object"),
    ("/api/next", b'{"count": 0}', "count: got 0; send a whole number from 1 to 256"),
    ("/api/next", b'{"count": true}', "count: got True"),
    ("/api/next", b'{"cuont": 2}', "unknown field 'cuont'; known: count"),
    ("/api/back", b'{"before": 1e9}', "before: got 1000000000.0"),
    ("/api/skip", b"{}", "assignment: got None"),
    ("/api/skip", b'{"assignment": 1, "reason": 5}', "reason: got 5; send text"),
    ("/api/skip", b'{"assignment": 99}', "assignment 99: is none of this annotator's"),
    ("/api/renew", b'{"assignment": 99}', "assignment 99: is none of this annotator's"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678", "ranks": {"1": NaN}}', "ranks"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678", "ranks": {"a": 1}}', "ranks"),
    ("/api/judgments", b'{"assignment": 99999999999999999999, "submission": "12345678", "flags": ["x"]}',
     "assignment: got 99999999999999999999"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678"}', "neither ranks"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678", "flags": ["\\ud800"]}', "flags"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678", "rewrite": "x","ratings": {"1": {"tone": 4}}}',
     "ratings.tone: got 4; send a whole number from 1 to 3"),
    ("/api/judgments", b'{"assignment": 1, "submission": "12345678", "rewrite": "x","ratings": {"1": {"tune": 1}}}',
     "did you mean tone?"),
)  # fmt: skip


def test_mistakes_are_one_line(store, url):
    anna = Person(url, store.invite("anna"))
    for path, body, says in MISTAKES:
        status, said, _ = anna.ask(path, body, Content_Type="application/json")
        assert (status, "\n" in said["error"]) == (400, False), (body[:80], said)
        assert says in said["error"], (body[:80], said)
    assert not store.judgments()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(store, url):
    anna = Person(url, store.invite("anna"))
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as sending:  # one that only says how much will come
        sending.sendall(
            b"POST /api/next HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n"
            b"Cookie: " + anna.cookie.encode() + b"\r\n\r\n"
        )
        answer = http.client.HTTPResponse(sending)
        answer.begin()
        assert answer.status == 413


def test_a_store_that_fails_is_no_mistake_of_the_annotator_and_its_path_is_not_told(store, url, monkeypatch, caplog):
    store.add_items(items(1))
    anna = Person(url, store.invite("anna"))
    task = anna.next()
    from rlhf.errors import RunStopped

    def full(*args):
        raise RunStopped(f"{store.path}: database or disk is full; nothing was stored")

    monkeypatch.setattr(store, "submit", full)
    status, said, _ = anna.judge(task)
    assert status == 503
    assert str(store.path) not in said["error"]
    assert "nothing was stored, try again" in said["error"]
    assert "disk is full" in caplog.text
    monkeypatch.undo()
    assert anna.judge(task)[0] == 200


def test_tokens_and_texts_do_not_reach_the_log(store, url, caplog):
    store.add_items(items(1))
    token = store.invite("anna")
    anna = Person(url, token)
    call(url, "/api/enter", {"token": "guessed-token"})
    anna.judge(anna.next(), comment="a private remark")
    anna.ask("/api/judgments", {"assignment": "x" * 50, "comment": "a private remark"})
    for text in (token, "guessed-token", "a private remark"):
        assert text not in caplog.text
