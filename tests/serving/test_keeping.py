"""What is kept of conversations: nothing without consent or `log`, and then scrubbed, under a pseudonym, for a time."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time

import pytest
from reference.policy_server import ScriptedEngine, serving, wait_for

from rlhf.client import Client
from rlhf.collection.store import Candidate, Conversation, Item, Store
from rlhf.errors import InputError, RunStopped
from rlhf.run.http import Refused
from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig
from rlhf.serving.feedback import read_feedback
from rlhf.serving.keeping import Keeper, texts_of
from rlhf.serving.wire import Wrong, read_chat, read_completion

MODELS = {"sft": "f1", "ppo": "f2"}
ASKED = {"role": "user", "content": "I am jo@mail.example. Why?"}
TALK = [ASKED, {"role": "assistant", "content": "Because."}]
THUMB = {"id": "thumb-0001", "kind": "thumb", "thumb": -1, "tags": ["wrong"], "consent": False, "model": "ppo"}
AGREED = {"consent": True, "conversation": "talk-0001", "messages": TALK, "person": "person-0001"}


def keeper(tmp_path, **settings):
    return Keeper(ServingConfig(store=str(tmp_path / "store.db"), **settings), MODELS)


def give(kept, **fields):
    return asyncio.run(kept.feedback(read_feedback(json.dumps(fields).encode())))


def texts_on_disk(tmp_path) -> str:
    return "".join(file.read_bytes().decode("latin-1") for file in tmp_path.glob("store.db*"))


def test_without_consent_no_text_is_kept(tmp_path):
    kept = keeper(tmp_path)
    given = {**THUMB, "responses": ["Because."], "edit": "Since.", "messages": TALK, "conversation": "talk-0001"}
    assert give(kept, **given) == {
        "stored": True,
        "conversation_kept": False,
        "expires": pytest.approx(time.time() + 30 * 86400, abs=60),
    }
    voted = {
        "id": "vote-0001", "kind": "comparison", "consent": False, "responses": ["One.", "Two."],
        "policies": ["ppo", "sft"], "order": [1, 0], "ranks": [2, 1],
    }  # fmt: skip
    give(kept, **voted)
    assert kept.store.conversations(usable=False) == []
    thumb, vote = kept.store.feedback(usable=False)
    assert (thumb.thumb, thumb.tags, thumb.policies, thumb.conversation, thumb.edit) == (
        -1,
        ("wrong",),
        ("ppo",),
        None,
        None,
    )
    assert (vote.ranks, vote.order, vote.policies, vote.responses) == ((2, 1), (1, 0), ("ppo", "sft"), ("", ""))
    assert kept.store.feedback(usable=True) == []
    kept.close()
    for text in ("Because", "Since", "One.", "jo@mail", "Why"):
        assert text not in texts_on_disk(tmp_path)


def test_with_consent_the_scrubbed_conversation_is_kept_for_a_time(tmp_path):
    kept = keeper(tmp_path, retention_days=2)
    give(kept, **THUMB | AGREED | {"seed": 5, "sampler": {"temperature": 0.5}})
    edit = {"id": "edit-0001", "kind": "edit", "edit": "Ask jo@mail.example.", "model": "ppo"}
    assert give(kept, **edit | AGREED)["stored"] is True
    assert give(kept, **edit | AGREED)["stored"] is False  # a repeat
    (talk,) = kept.store.conversations(usable=True)
    assert [message["content"] for message in talk.messages] == ["I am [mail]. Why?", "Because."]
    assert (talk.policy, talk.fingerprint, talk.person, talk.consent, talk.scrubbed) == (
        "ppo",
        "f2",
        "person-0001",
        True,
        True,
    )
    assert talk.expires == pytest.approx(time.time() + 2 * 86400, abs=60)
    thumb, better = kept.store.feedback(usable=True)
    assert (thumb.turn, thumb.responses, better.edit) == (1, ("Because.",), "Ask [mail].")
    assert kept.store.erase(person="person-0001") == {"feedback": 2, "conversations": 1, "items": 0}
    kept.close()
    assert "Because" not in texts_on_disk(tmp_path)


def test_a_comparison_is_of_the_question(tmp_path):
    kept = keeper(tmp_path)
    voted = {
        "id": "vote-0001", "kind": "comparison", "responses": ["Yes.", "No."], "policies": ["ppo", "sft"],
        "order": [1, 0], "ranks": [1, 1],
    }  # fmt: skip
    give(kept, **voted | AGREED | {"messages": [ASKED]})
    (vote,) = kept.store.feedback(usable=True)
    assert (vote.turn, vote.responses, vote.ranks) == (1, ("Yes.", "No."), (1, 1))
    (talk,) = kept.store.conversations()
    assert talk.columns == {"fingerprints": {"ppo": "f2", "sft": "f1"}}
    kept.close()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"consent": None}, "consent: got None; send true or false"),
        ({"consent": "yes"}, "consent: got 'yes'"),
        ({"kind": "star"}, "kind: got 'star'"),
        ({"thumb": 0}, "thumb: got 0"),
        ({"id": "x"}, "id: got 'x'"),
        ({"id": "../../../etc"}, "id: got"),
        ({"person": "a b c d e f"}, "person: got"),
        ({"tags": ["my own words"]}, "tags: 'my own words' is none of"),
        ({"kind": "edit", "edit": "x"}, "consent: a better answer is kept only"),
        ({"kind": "comparison", "responses": ["a"], "ranks": [1]}, "ranks: 1 for 1 responses"),
        ({"kind": "comparison", "responses": ["a", "b"], "ranks": [1]}, "ranks: 1 for 2 responses"),
        ({"kind": "comparison", "responses": ["a", "b"], "ranks": [1, 2], "order": [0, 0]}, "order: send each index"),
        ({"consent": True}, "conversation: got None"),
        ({"consent": True, "conversation": "talk-0001"}, "messages"),
        ({"consent": True, "conversation": "talk-0001", "messages": TALK[:1]}, "the last turn is 'user'"),
        ({"sampler": {"x": 1}}, "sampler: got"),
        ({"policies": ["ppo", "sft"], "responses": ["one"]}, "policies: 2 policies for 1 responses"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"model": "gpt"}, "no policy 'gpt' is here"),
    ],
)
def test_wrong_feedback_is_refused(tmp_path, fields, line):
    kept = keeper(tmp_path)
    with pytest.raises(Wrong, match=line):
        give(kept, **THUMB | fields)
    assert kept.store.feedback(usable=False) == []
    kept.close()


def test_the_log_is_off_unless_asked_for(tmp_path, caplog):
    for log in (False, True):
        config = ServingConfig(store=str(tmp_path / f"{log}.db"), log=log, retention_days=1)
        engine = ScriptedEngine()
        kept = Keeper(config, engine.models)
        with serving(Service(engine, config, kept)) as url:
            client = Client(url, model="ppo")
            client.chat([ASKED], n=2, temperature=0.5, top_p=0.9, seed=3)
            "".join(client.stream([ASKED]))
            client.complete("Once jo@mail.example", max_tokens=5)
        with sqlite3.connect(tmp_path / f"{log}.db") as db:
            assert db.execute("SELECT count(*) FROM conversations").fetchone() == ((3,) if log else (0,))
    chat, stream, plain = Keeper(config, engine.models).store.conversations(usable=False)
    assert chat.messages == [
        {"role": "user", "content": "I am [mail]. Why?"},
        {"role": "assistant", "content": "ppo heard: I am [mail]. Why?"},
    ]
    assert (chat.policy, chat.fingerprint, chat.seed) == ("ppo", "fingerprint of ppo", 3)
    assert chat.sampler == {"temperature": 0.5, "top_p": 0.9}
    assert (chat.person, chat.consent, chat.scrubbed) == ("anonymous", False, True)
    assert chat.expires == pytest.approx(time.time() + 86400, abs=60)
    assert chat.columns == {"other_answers": ["ppo heard: I am [mail]. Why?"]}
    assert stream.messages == chat.messages
    assert plain.messages[0]["content"] == "Once [mail]"
    assert "jo@mail" not in caplog.text


def test_a_users_name_is_kept_as_a_pseudonym(tmp_path):
    kept = keeper(tmp_path, log=True)
    name = kept.pseudonym("jo@mail.example")
    assert name.startswith("user-")
    assert name == keeper(tmp_path).pseudonym("jo@mail.example")  # the same after a restart
    assert name != kept.pseudonym("ann@mail.example")
    kept.close()
    assert "jo@mail" not in texts_on_disk(tmp_path)


class Failing(ScriptedEngine):
    """Fails after two words."""

    async def stream(self, request):
        yield (await anext(words := super().stream(request)))
        yield (await anext(words))
        raise Refused(500, "decoding failed")


@pytest.mark.parametrize("engine", [ScriptedEngine(pause=0.05), Failing()], ids=["hung up", "failed"])
def test_an_answer_that_is_given_up_is_kept_as_far_as_it_was_written(tmp_path, engine):
    config = ServingConfig(store=str(tmp_path / "store.db"), log=True)
    service = Service(engine, config, Keeper(config, engine.models))
    with serving(service) as url:
        pieces = Client(url, model="ppo").stream([ASKED])
        assert [next(pieces), next(pieces)] == ["ppo", " heard:"]
        if isinstance(engine, Failing):
            with pytest.raises(RunStopped, match="decoding failed"):
                next(pieces)
        pieces.close()
        wait_for(lambda: service.slots.taken == 0)
        assert service.answered == 0
    (talk,) = Keeper(config, engine.models).store.conversations(usable=False)
    assert talk.messages[0]["content"] == "I am [mail]. Why?"
    assert talk.messages[1]["content"].startswith("ppo heard:")
    assert talk.columns == {"cut": True}


def test_of_several_prompts_each_keeps_what_was_written(tmp_path):
    kept = keeper(tmp_path, log=True)
    asked = read_completion(b'{"prompt": ["One", "Two", "Three"], "n": 2}')
    chunks = [{"choices": [{"index": index, "text": text}]} for index, text in ((1, "b"), (2, "c"))]
    assert texts_of(chunks) == ["", "b", "c"]
    asyncio.run(kept.logged(asked, "cmpl", 1, "sft", texts_of(chunks), cut=True))
    rows = [(talk.messages[1]["content"], talk.columns) for talk in kept.store.conversations(usable=False)]
    assert rows == [("", {"other_answers": ["b"], "cut": True}), ("c", {"cut": True}), ("", {"cut": True})]
    kept.close()


def test_servers_that_start_at_once_share_a_salt(tmp_path, monkeypatch):
    first = []

    def both_look(self, name, default=None):
        """The second server starts where the first one has read the settings, and not yet written."""
        found = setting(self, name, default)
        if not first:
            first.append("second")
            first.append(keeper(tmp_path).pseudonym("ann"))
        return found

    setting = Store.setting
    monkeypatch.setattr(Store, "setting", both_look)
    name = keeper(tmp_path).pseudonym("ann")
    assert first[1:] in ([], [name])
    assert keeper(tmp_path).pseudonym("ann") == name


def test_a_failed_expiry_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    kept = keeper(tmp_path)
    past = {"person": "p", "scrubbed": True, "expires": time.time() - 1}
    kept.store.add_conversation(Conversation(id="talk-0001", messages=TALK, **past))
    turns, expire = [], kept.store.expire

    def busy_once():
        turns.append(1)
        if len(turns) == 1:
            raise RunStopped("store.db: another process holds it")
        return expire()

    async def hours(seconds):
        assert seconds == 3600
        if len(turns) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(kept.store, "expire", busy_once)
    monkeypatch.setattr("rlhf.serving.keeping.asyncio.sleep", hours)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(kept.expire())
    assert kept.store.conversations(usable=False) == []
    assert "could not be erased: Refused: store.db: another process holds it" in caplog.text
    kept.close()


def test_a_user_is_erased_by_the_name_that_the_client_sends(tmp_path):
    kept = keeper(tmp_path, log=True)
    for user, text in (("alice", "MARK-a"), ("bob", "MARK-b")):
        body = {"messages": [{"role": "user", "content": text}], "user": user}
        asyncio.run(kept.logged(read_chat(json.dumps(body).encode()), f"answer-{user}", 1, "sft", ["Yes."]))
    give(kept, **THUMB | AGREED | {"person": "alice-on-the-page"})
    review = Item([ASKED], (Candidate("Because."), Candidate("No.")), person=kept.pseudonym("alice"))
    kept.store.add_items([review])
    assert kept.store.erase(person="alice") == {"feedback": 0, "conversations": 1, "items": 1}
    assert {talk.person for talk in kept.store.conversations(usable=False)} == {
        kept.pseudonym("bob"),
        "alice-on-the-page",
    }
    kept.close()
    assert "MARK-a" not in texts_on_disk(tmp_path)
    assert "MARK-b" in texts_on_disk(tmp_path)


def test_a_rule_of_ones_own(tmp_path):
    config = ServingConfig(store=str(tmp_path / "store.db"))
    kept = Keeper(config, MODELS, rule=lambda text: text.replace("Because", "[reason]"))
    give(kept, **THUMB | AGREED)
    (talk,) = kept.store.conversations()
    assert talk.messages[1]["content"] == "[reason]."
    kept.close()


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "store.db").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(InputError, match=r"store\.db"):
        keeper(tmp_path)
