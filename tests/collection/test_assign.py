"""Who gets which item: overlap, leases, skips, calibration, gold items, the order shown."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict

import pytest
from reference.labelling import Clock, answer, item, items

from rlhf.collection.assign import order_shown
from rlhf.collection.store import HandedOn, Plan, Store, Task
from rlhf.errors import InputError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock, no_fsync):
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.set_plan(Plan(lease_seconds=60, gold_share=0.0))
        for name in ("ann", "bob", "cy"):
            store.add_annotator(name)
        yield store


def names(store: Store, name: str, count: int = 1) -> list[str]:
    return [task.prompt[0]["content"].removeprefix("question ") for task in store.lease(name, count)]


def work(store: Store, name: str) -> list[str]:
    """Let an annotator judge until nothing is left; returns what they got."""
    got = []
    while tasks := store.lease(name):
        got.append(tasks[0].prompt[0]["content"].removeprefix("question "))
        store.submit(name, answer(tasks[0]))
    return got


def people_per_item(store: Store) -> dict[int, list[str]]:
    people = defaultdict(list)
    for said in store.judgments():
        people[said.item].append(said.annotator)
    return people


@pytest.mark.parametrize("seed", range(2))
def test_overlap_3_over_8_annotators_and_300_items(tmp_path, no_fsync, seed):
    """A drawn schedule in which people hold tasks side by side, judge, skip, stay away until their lease has ended, and
    answer too late."""
    draw, clock, names = random.Random(seed), Clock(), [f"annotator {n}" for n in range(8)]
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.set_plan(Plan(lease_seconds=60, gold_share=0.0))
        for name in names:
            store.add_annotator(name)
        store.add_items(items(300, 2), overlap=3)
        held, events = dict[str, Task](), Counter[str]()
        while open_places(store):
            clock.now += draw.uniform(0, 6)
            name = draw.choice(names)
            if name not in held:
                tasks = store.lease(name)
                events["nothing left for one"] += not tasks
                held |= {name: tasks[0]} if tasks else {}
            elif draw.random() < 0.03:
                store.skip(name, held.pop(name).assignment)
                events["skipped"] += 1
            else:
                task = held.pop(name)
                late = clock.now > task.lease_until
                try:
                    store.submit(name, answer(task))
                    events["late, and stored"] += late
                except HandedOn:
                    events["late, and handed on"] += 1
        assert {len(set(people)) for people in people_per_item(store).values()} == {3}
        assert [len(people) for people in people_per_item(store).values()] == [3] * 300
        assert len(events) == 4, events
        assert min(events.values()) > 0, events


def open_places(store: Store) -> bool:
    with store.reading() as db:
        left = db.execute("SELECT count(*) FROM items WHERE places > 0").fetchone()[0]
        return bool(left or db.execute("SELECT count(*) FROM assignments WHERE state = 'leased'").fetchone()[0])


def test_threads_at_once_share_the_places_out(tmp_path, no_fsync):
    with Store(tmp_path / "labels.db") as store:
        store.add_items(items(40, 2), overlap=3)
        people = [f"annotator {n}" for n in range(6)]
        for name in people:
            store.add_annotator(name)
        threads = [threading.Thread(target=work, args=(store, name)) for name in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(len(set(people)) == len(people) == 3 for people in people_per_item(store).values())
        assert len(people_per_item(store)) == 40


def test_an_item_comes_once_and_stays_until_it_is_judged(store):
    store.add_items(items(3))
    assert names(store, "ann") == names(store, "ann") == ["q0"]  # a reload gets the same task
    assert names(store, "bob") == ["q1"]  # q0 has one place, and ann holds it
    assert names(store, "ann", 3) == ["q0", "q2"]
    assert names(store, "cy") == []


def test_a_lease_that_ends_goes_to_the_next_person_first(store, clock):
    store.add_items(items(4))
    (task,) = store.lease("ann")
    clock.now += 59
    assert names(store, "bob") == ["q1"]
    clock.now += 2
    assert names(store, "cy") == ["q0"]
    with pytest.raises(HandedOn, match=r"its lease had ended, .* and the item went to others; not stored"):
        store.submit("ann", answer(task))
    assert names(store, "ann") == ["q2"]
    assert store.judgments() == []


def test_who_comes_late_may_answer_as_long_as_nobody_else_has_it(store, clock):
    store.add_items(items(2))
    (task,) = store.lease("ann")
    clock.now += 600
    assert names(store, "bob", 1) == ["q0"]
    store.skip("bob", store.lease("bob")[0].assignment)
    said = store.submit("ann", answer(task))
    assert said.item == task.item
    assert names(store, "cy", 2) == ["q1"]


def test_a_lease_is_renewed_while_somebody_is_at_work(store, clock):
    store.add_items(items(1))
    (task,) = store.lease("ann")
    for _ in range(3):
        clock.now += 50
        assert store.renew("ann", task.assignment)
    clock.now += 50
    assert names(store, "ann") == ["q0"]  # asking for the task renews it, too
    clock.now += 50
    assert names(store, "bob") == []
    clock.now += 61
    assert names(store, "bob") == ["q0"]
    assert not store.renew("ann", task.assignment)
    with pytest.raises(InputError, match="none of this annotator's"):
        store.renew("cy", task.assignment)


def test_a_skipped_item_goes_to_others_only(store):
    store.add_items(items(2))
    (task,) = store.lease("ann")
    store.skip("ann", task.assignment, "unreadable")
    store.skip("ann", task.assignment)  # sent twice
    assert names(store, "ann", 5) == ["q1"]
    assert names(store, "bob", 5) == ["q0"]
    assert store.progress("ann").skipped == 1
    store.submit("bob", answer(store.lease("bob")[0]))
    with pytest.raises(InputError, match="is judged already"):
        store.skip("bob", store.history("bob")[0].assignment)


def test_everybody_begins_with_the_calibration_part(store):
    store.add_items(items(5), overlap=1)
    store.add_items(items(3, prefix="c"), line="calibration")
    got = {name: work(store, name) for name in ("ann", "bob", "cy")}
    assert all(seen[:3] == ["c0", "c1", "c2"] for seen in got.values())
    assert sorted(name for seen in got.values() for name in seen[3:]) == ["q0", "q1", "q2", "q3", "q4"]


def test_a_calibration_lease_that_ends_comes_back_to_its_own_annotator(store, clock):
    store.add_items(items(2, prefix="c"), line="calibration")
    store.add_items(items(1))
    assert names(store, "ann") == ["c0"]
    clock.now += 61
    assert work(store, "ann") == ["c0", "c1", "q0"]
    assert work(store, "bob") == ["c0", "c1"]


def test_gold_items_are_mixed_in_at_their_share(store):
    store.set_plan(Plan(gold_share=0.2))
    store.add_items(items(200), overlap=2)
    store.add_items([item(f"g{n}", gold_ranks=(1, 2, 3)) for n in range(60)], line="gold")
    got = {name: work(store, name) for name in ("ann", "bob")}
    for seen in got.values():
        gold = [n for n, name in enumerate(seen) if name.startswith("g")]
        assert 0.12 < len(gold) / len(seen) < 0.28
        assert len(set(seen)) == len(seen)
        assert max(gold) > 150
    places = {name: [seen[n][0] for n in range(100)] for name, seen in got.items()}
    assert places["ann"] != places["bob"]  # nobody can tell from the others where gold comes


def test_what_is_put_first_comes_next_even_to_those_who_are_past_it(store):
    ids = store.add_items(items(6), overlap=2)
    for _ in range(2):
        store.submit("ann", answer(store.lease("ann")[0]))
    store.put_first([ids[5], ids[0]])
    assert names(store, "ann", 5) == ["q5", "q2", "q3", "q4"]  # q0 is judged by ann
    assert names(store, "bob", 3) == ["q5", "q0", "q1"]


@pytest.mark.parametrize("count", [0, -1])
def test_a_lease_is_of_one_task_or_more(store, count):
    with pytest.raises(InputError, match=f"got count={count}; ask for one task or more"):
        store.lease("ann", count)


def test_an_overlap_of_0_is_for_nobody(store):
    store.add_items(items(2), overlap=0)
    assert names(store, "ann", 5) == []


def test_the_order_shown_is_a_function_of_seed_item_and_annotator(store, tmp_path):
    store.add_items(items(30, 4), overlap=3)
    with Store(tmp_path / "other.db") as other:
        other.add_items(items(30, 4)[::-1], overlap=3)  # other ids
        other.add_annotator("ann")
        orders = [{task.prompt[0]["content"]: [c.text for c in task.candidates] for task in one.lease("ann", 30)}
                  for one in (store, other)]  # fmt: skip
    assert orders[0] == orders[1]
    theirs = {task.prompt[0]["content"]: [c.text for c in task.candidates] for task in store.lease("bob", 30)}
    assert theirs != orders[0]
    assert order_shown(0, "key", "ann", 9) != order_shown(1, "key", "ann", 9)
    first = Counter(order_shown(0, f"item {n}", "ann", 4)[0] for n in range(4000))
    assert max(first.values()) - min(first.values()) < 200  # 1000 each, give or take three standard deviations


def test_what_is_left_for_an_annotator(store):
    store.add_items(items(4), overlap=1)
    store.add_items(items(1, prefix="c"), line="calibration")
    store.add_items([item("g", gold_ranks=(1, 2, 3))], line="gold")
    assert store.outlook("ann").mine == 5
    store.submit("bob", answer(store.lease("bob")[0]))
    store.lease("bob")
    outlook, progress = store.outlook("ann"), store.progress("bob")
    assert (outlook.mine, outlook.held) == (4, 1)
    assert (progress.done, progress.skipped, progress.left) == (1, 0, 3)


@pytest.mark.long
def test_next_and_submit_take_no_longer_in_a_large_store(tmp_path):
    """p95 of next + submit at 20,000 items is under 50 ms, and under three times that of an empty store."""

    def p95(count: int) -> float:
        with Store(tmp_path / f"{count}.db") as store:
            store.add_items(items(count, 4), overlap=3)
            for name in ("busy", "new"):
                store.add_annotator(name)
            for task in store.lease("busy", count // 2):  # open to others, and behind this annotator's cursor
                if task.item % 3 == 0:
                    store.skip("busy", task.assignment)
            seconds = []
            for n in range(240):
                name = ("busy", "new")[n % 2]
                start = time.perf_counter()
                (task,) = store.lease(name)
                store.submit(name, answer(task))
                seconds.append(time.perf_counter() - start)
            return sorted(seconds[40:])[189]

    small, large = p95(600), p95(20_000)
    print(f"p95 of next + submit: {1000 * small:.1f} ms at 600 items, {1000 * large:.1f} ms at 20,000")
    assert large < 0.05
    assert large < 3 * small
