"""Simulated labelers at the desk: the toy world's rankings, byte for byte those of the rankings stage."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference.labelling import Clock, items

from rlhf.collection import export, measured
from rlhf.collection.desk import StoreDesk, label
from rlhf.collection.store import Candidate, Item, Plan, Store
from rlhf.errors import InputError
from rlhf.rows.fields import further_columns
from rlhf.rows.records import Prompt, read_demonstrations, read_prompts, write_jsonl

TOY = Path(__file__).parents[2] / "data" / "toy"


@pytest.fixture
def toy_on_path() -> Iterator[None]:
    sys.path.append(str(TOY))
    yield
    sys.path.remove(str(TOY))


def toy(folder: Path, count: int = 60) -> tuple[list[Prompt], list[list[str]]]:
    """Make prompts of the toy world, and four responses to each: answers that people of it wrote."""
    import toy_world

    toy_world.make(folder, 3, prompts=count, demonstrations=count, pretraining_documents=10, evaluation_prompts=8)
    texts = [d.response for d in read_demonstrations(str(folder / "demonstrations.jsonl"))]
    draw = random.Random(5)
    prompts = read_prompts(str(folder / "prompts.jsonl"))
    return prompts, [draw.sample(texts, 4) for _ in prompts]


def test_simulated_labelers_give_the_rankings_of_the_stage_byte_for_byte(tmp_path, toy_on_path, no_fsync):
    import toy_labelers

    from rlhf_recipes import rankings as stage

    prompts, responses = toy(tmp_path / "toy")
    ranked = stage.ranked_by(toy_labelers.rank, prompts, responses, seed=7)
    write_jsonl(tmp_path / "stage.jsonl", ranked)
    with Store(tmp_path / "labels.db") as store:
        store.add_items(
            Item(prompt.messages, tuple(map(Candidate, texts)), further_columns(prompt.columns))
            for prompt, texts in zip(prompts, responses, strict=True)
        )
        store.set_plan(Plan(seed=99))
        assert label(StoreDesk(store, "toy"), toy_labelers.rank, seed=7, batch=16) == len(prompts)
        orders = [said.order for said in store.judgments()]
        rows = export.export(measured.snapshot(store), "rankings", provenance=False).rows
    write_jsonl(tmp_path / "store.jsonl", rows)
    assert (tmp_path / "store.jsonl").read_bytes() == (tmp_path / "stage.jsonl").read_bytes()
    assert len(set(orders)) > 10  # although each item was shown in an order of its own


def test_a_desk_is_one_annotators(tmp_path):
    with Store(tmp_path / "labels.db") as store:
        store.add_items(items(3), overlap=2)
        desks = [StoreDesk(store, "judge", "model"), StoreDesk(store, "ann", "simulated")]

        def alphabetical(prompts, responses, seed, **columns):
            return [[sorted(texts).index(text) for text in texts] for texts in responses]

        assert [label(desk, alphabetical, seed=0, batch=2) for desk in desks] == [3, 3]
        assert {(said.annotator, said.ranks) for said in store.judgments()} == {
            ("judge", (0, 1, 2)), ("ann", (0, 1, 2))}  # fmt: skip
        assert {one.name: one.kind for one in store.annotators()} == {"judge": "model", "ann": "simulated"}
        assert desks[0].lease() == ()


def test_a_function_at_the_desk_may_spoil_what_it_gets(tmp_path):
    with Store(tmp_path / "labels.db") as store:
        store.add_items(items(2, columns={"facts": ["x"]}))

        def spoil(prompts, responses, seed, facts):
            prompts[0].clear(), responses.reverse(), facts[0].clear()
            return [(1, 2, 3), (3, 2, 1)]

        assert label(StoreDesk(store, "ann"), spoil, seed=0) == 2
        assert [said.ranks for said in store.judgments()] == [(1, 2, 3), (3, 2, 1)]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([(1, 2, 3)], "returned ranks for 1 prompts of 2"),
        ([(1, 2), (1, 2, 3)], "2 ranks for 3 responses"),
        ([(1, 2, 3), (1, "x", 3)], "returned .*'x'.*; return a list of numbers for each prompt"),
        ([(1, 2, 3), (1, float("nan"), 3)], "returned .*nan.*; return a list of numbers for each prompt"),
        ([1, 2], r"returned \[1, 2\]; return a list of numbers for each prompt"),
        (None, "returned None; return a list of numbers for each prompt"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(tmp_path, ranks, said):
    from rlhf_recipes.rankings import ranked_by

    with pytest.raises(InputError, match=said):
        ranked_by(lambda *given, **columns: ranks, read_prompts([{"prompt": "a"}] * 2), [["x", "y", "z"]] * 2, seed=0)
    with Store(tmp_path / "labels.db") as store:
        store.add_items(items(2))
        with pytest.raises(InputError, match=said):
            label(StoreDesk(store, "ann"), lambda prompts, responses, seed: ranks, seed=0)
        assert store.judgments() == []


def test_a_slow_function_goes_on_where_others_took_a_task_of_it(tmp_path):
    clock = Clock()
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.set_plan(Plan(lease_seconds=60))
        store.add_items(items(3))
        store.add_annotator("bob")
        taken = []

        def slow(prompts, responses, seed):
            if not taken:
                clock.now += 61
                taken.extend(store.lease("bob"))
            return [(1, 2, 3)] * len(prompts)

        assert label(StoreDesk(store, "ann"), slow, seed=0, batch=2) == 2
        assert len(taken) == 1
        assert len(store.judgments()) == 2
