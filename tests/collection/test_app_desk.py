"""Machines over HTTP: their rankings are byte for byte those of a labeler in the server's process, or of none."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reference.served import served

from rlhf.collection.app import LabelConfig, create_app
from rlhf.collection.desk import Desk, StoreDesk, label
from rlhf.collection.http_desk import HttpDesk
from rlhf.collection.project import Project
from rlhf.collection.store import Answer, Candidate, HandedOn, Item, Plan, Store
from rlhf.errors import InputError, RunStopped
from rlhf.rows.records import write_jsonl

TOY = Path(__file__).parents[2] / "data" / "toy"
SEED = 5


@pytest.fixture(scope="module", autouse=True)
def toy_on_path() -> Iterator[None]:
    sys.path.append(str(TOY))
    yield
    sys.path.remove(str(TOY))


@pytest.fixture(scope="module")
def world() -> list[tuple[dict, tuple[str, ...]]]:
    """Requests of the toy world, each with four different answers."""
    import toy_world
    import toy_writers

    rng, made = random.Random(1), []
    for request in toy_world.requests(rng, 80, set()):
        kinds = ("wrong", "partial", "other")
        answers = {toy_writers.answer(request, rng) + " " + extra for extra in ("Thanks!", "", "Bye.", *kinds)}
        made.append((request.row(), tuple(sorted(answers))[:4]))
    return made


def written(store: Store) -> bytes:
    """Return the rankings of a store as the rows of `rlhf rankings`, in the items' order."""
    said = {judgment.item: judgment for judgment in store.judgments()}
    rows = []
    for item in store.items():
        texts, ranks = [candidate.text for candidate in item.candidates], list(said[item.id].ranks or ())
        rows.append({"prompt": item.prompt, "responses": texts, "ranks": ranks, **item.columns})
    path = store.path.with_suffix(".jsonl")
    write_jsonl(path, rows)
    return path.read_bytes()


def filled(path: Path, world) -> Store:
    store = Store(path)
    store.set_plan(Plan(seed=11, gold_share=0.0))  # the order shown is drawn, and the labelers' must not depend on it
    store.add_items(
        Item(row["prompt"], tuple(Candidate(text) for text in texts), {"family": row["family"], "facts": row["facts"]})
        for row, texts in world
    )
    return store


def test_labels_over_http_are_those_in_process_and_without_a_store(tmp_path, world):
    from toy_labelers import rank

    stage = tmp_path / "stage.jsonl"
    ranks = rank(
        [row["prompt"] for row, _ in world], [list(texts) for _, texts in world], SEED,
        family=[row["family"] for row, _ in world], facts=[row["facts"] for row, _ in world],
    )  # fmt: skip
    write_jsonl(stage, (
        {"prompt": row["prompt"], "responses": list(texts), "ranks": list(order), "family": row["family"],
         "facts": row["facts"]}
        for (row, texts), order in zip(world, ranks, strict=True)
    ))  # fmt: skip
    with filled(tmp_path / "in_process.db", world) as store:
        assert label(StoreDesk(store, "ada"), rank, SEED) == len(world)
        in_process = written(store)
    with filled(tmp_path / "http.db", world) as store:
        config, token = LabelConfig(), store.invite("ada", "simulated")
        with served(create_app(store, Project(), config), config) as url:
            assert label(HttpDesk(url, token), rank, SEED, batch=13) == len(world)
        over_http = written(store)
        shown = {judgment.order for judgment in store.judgments()}
        assert len(shown) > 10
    assert in_process == over_http == stage.read_bytes()
    assert len({tuple(order) for order in ranks}) > 10


def test_several_labelers_at_once_get_what_they_would_get_alone(tmp_path, world):
    from toy_labelers import rank

    names, world = ("ada", "ben", "cleo"), world[:40]
    with filled(tmp_path / "alone.db", world) as store:
        label(StoreDesk(store, "ada"), rank, SEED)
        alone = written(store)
    with Store(tmp_path / "together.db") as store:
        store.add_items(
            (Item(row["prompt"], tuple(Candidate(text) for text in texts),
                  {"family": row["family"], "facts": row["facts"]}) for row, texts in world),
            overlap=3,
        )  # fmt: skip
        config = LabelConfig()
        with served(create_app(store, Project(), config), config) as url, ThreadPoolExecutor(3) as pool:
            desks = [HttpDesk(url, store.invite(name, "simulated")) for name in names]
            assert list(pool.map(lambda desk: label(desk, rank, SEED, batch=7), desks)) == [len(world)] * 3
        judgments = store.judgments()
        assert len({(said.item, said.annotator) for said in judgments}) == 3 * len(world) == len(judgments)
        assert written(store) == alone  # one seed, so that all three say the same


def test_a_desk_over_http_does_what_one_in_process_does(tmp_path):
    def drive(desk: Desk) -> list[object]:
        seen: list[object] = []
        (task,) = desk.lease()
        seen.append((task.prompt, [shown.text for shown in task.candidates], dict(task.columns), task.answer))
        assert [held.assignment for held in desk.lease()] == [task.assignment]
        ranks = {shown.id: float(n) for n, shown in enumerate(task.candidates)}
        answer = Answer(
            assignment=task.assignment, submission="0" * 32, ranks=ranks, ratings={}, comment="é\u2028", flags=("odd",)
        )
        seen.append(desk.submit(answer) == desk.submit(answer))
        (other,) = desk.lease()
        desk.skip(other.assignment, "no idea")
        seen.append(desk.lease())
        for wrong in (
            Answer(assignment=99, submission="1" * 32, ranks=ranks),
            Answer(assignment=task.assignment, submission="2" * 32, ranks={10**6: 1.0}),
        ):
            with pytest.raises(InputError):
                desk.submit(wrong)
        return seen

    candidates, columns = (Candidate("<b>a</b>"), Candidate("b")), {"x": [1.5, None]}
    items = [Item([{"role": "user", "content": f"{n}?"}], candidates, columns) for n in range(2)]
    stores = [Store(tmp_path / name) for name in ("one.db", "two.db")]
    for store in stores:
        store.add_items(items)
    here = drive(StoreDesk(stores[0], "ada"))
    config, token = LabelConfig(), stores[1].invite("ada", "simulated")
    with served(create_app(stores[1], Project(), config), config) as url:
        there = drive(HttpDesk(url, token))
    assert here == there
    said = [[(j.ranks, j.comment, j.flags, j.submission) for j in store.judgments()] for store in stores]
    assert said[0] == said[1]
    for store in stores:
        store.close()


def test_errors_of_a_desk_are_one_line(tmp_path, world):
    with filled(tmp_path / "labels.db", world[:1]) as store:
        token, config = store.invite("ada", "simulated"), LabelConfig()
        with served(create_app(store, Project(), config), config) as url:
            with pytest.raises(InputError, match="the token lets nobody in"):
                HttpDesk(url, "nobody-has-this").lease()
            (task,) = HttpDesk(url, token).lease()
            store.clock = lambda: task.lease_until + 1
            assert HttpDesk(url, store.invite("ben", "simulated")).lease()
            late = Answer(assignment=task.assignment, submission="0" * 32, ranks={c.id: 1.0 for c in task.candidates})
            with pytest.raises(HandedOn, match="went to others"):
                HttpDesk(url, token).submit(late)
        with pytest.raises(RunStopped, match="no answer in 1 attempts"):
            HttpDesk(url, token, retries=0).lease()


def test_another_server_is_recognised(monkeypatch):
    desk = HttpDesk("http://127.0.0.1:1", "token")
    for text in ("[]", "no JSON", json.dumps({"tasks": [{}]}), "{}"):
        monkeypatch.setattr(desk.caller, "ask", lambda path, body, most, text=text: (200, text))
        with pytest.raises(RunStopped, match="is it a server of `rlhf label`"):
            desk.lease()
