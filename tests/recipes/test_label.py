"""`rlhf label`: what goes into the store, who is invited, what is refused before anything is touched."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reference import recipe
from reference.served import call
from reference.tiny_chain import save_base

from rlhf import config as configs
from rlhf.collection.store import Plan, Store
from rlhf.errors import InputError

label = recipe.load("label")
LabelRecipe, add_items, invite, named = label.LabelRecipe, label.add_items, label.invite, label.named
ROOT = Path(__file__).resolve().parents[2]


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"What is {n}?", "responses": [f"{n} a", f"{n} b", f"{n} c"]} for n in range(start, start + count)
    ]


@pytest.fixture
def write(tmp_path):
    def written(name: str, content: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(tmp_path / name)

    return written


def asked(tmp_path, **settings):
    return LabelRecipe(store=str(tmp_path / "labels.db"), **settings)


# -- items -------------------------------------------------------------------------------------------------


def test_everybody_gets_the_calibration_items_first_and_gold_is_mixed_in(tmp_path, write, capsys):
    gold = [{**row, "ranks": [1, 2, 3]} for row in rows(3, start=100)]
    config = asked(
        tmp_path, candidates=write("items.jsonl", rows(12)), gold=write("gold.jsonl", gold), calibration=4, overlap=2,
        gold_share=0.5, seed=7, lease_minutes=5,
    )  # fmt: skip
    with Store(config.store) as store:
        add_items(store, config)
        assert store.plan == Plan(seed=7, lease_seconds=300, gold_share=0.5)
        got = {}
        for name in ("anna", "ben", "cleo"):
            store.add_annotator(name)
            got[name] = [task.prompt[0]["content"] for task in store.lease(name, 99)]
        first = {frozenset(prompts[:4]) for prompts in got.values()}
        assert len(first) == 1  # the same four, drawn, not the file's first
        assert first != {frozenset(f"What is {n}?" for n in range(4))}
        known = {row["prompt"] for row in gold}
        assert known & set(got["anna"])
        rest = [prompt for prompts in got.values() for prompt in prompts[4:] if prompt not in known]
        assert sorted(rest) == sorted(2 * [row["prompt"] for row in rows(12) if row["prompt"] not in next(iter(first))])


def test_the_same_command_adds_nothing_twice_and_another_file_adds_to_it(tmp_path, write):
    config = asked(tmp_path, candidates=write("items.jsonl", rows(5)))
    with Store(config.store) as store:
        add_items(store, config)
        add_items(store, config)
        assert len(store.items()) == 5
        write("items.jsonl", rows(6))  # the file's content counts, not its name
        add_items(store, config)
        assert len(store.items()) == 6
        add_items(store, asked(tmp_path))
        assert len(store.items()) == 6


@pytest.mark.parametrize("named", ["d@train", "d:sub", "~/d"])
def test_new_rows_in_a_folder_are_added_however_it_is_named(tmp_path, write, monkeypatch, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d" / "sub").mkdir(parents=True)
    config = asked(tmp_path, candidates=named if named.startswith("~") else str(tmp_path / named))
    with Store(config.store) as store:
        for count in (5, 6):
            write("d/sub/train.jsonl" if ":" in named else "d/train.jsonl", rows(count))
            add_items(store, config)
            assert len(store.items()) == count


def test_a_corrected_gold_file_corrects_the_store_and_back(tmp_path, write, capsys):
    known = [{**row, "ranks": [1, 2, 3]} for row in rows(3, start=100)]
    mended = [known[0], *({**row, "responses": row["responses"][::-1], "ranks": [1, 2, 2]} for row in known[1:])]
    with Store(tmp_path / "labels.db") as store:
        for content, corrected, ranks in (
            (known, 0, (1, 2, 3)), (mended, 2, (2, 2, 1)), (mended, 0, (2, 2, 1)), (known, 2, (1, 2, 3)),
        ):  # fmt: skip
            files = {"candidates": write("items.jsonl", rows(5)), "gold": write("gold.jsonl", content)}
            add_items(store, asked(tmp_path, **files))
            gold = [item.gold_ranks for item in store.items() if item.gold_ranks]
            assert gold == [(1, 2, 3), ranks, ranks]
            said = capsys.readouterr().out
            assert (f"{corrected} gold items corrected" in said) == bool(corrected)


def test_how_items_are_handed_out_changes_only_where_it_is_asked_for(tmp_path, write):
    files = {"candidates": write("items.jsonl", rows(2))}
    with Store(tmp_path / "labels.db") as store:
        for settings, planned in (
            ({**files, "seed": 5}, Plan(seed=5, lease_seconds=1800, gold_share=0.1)),
            ({**files, "seed": 5, "lease_minutes": 4}, Plan(seed=5, lease_seconds=240, gold_share=0.1)),
            ({"gold_share": 0.0}, Plan(seed=5, lease_seconds=240, gold_share=0.0)),
            (
                {"candidates": write("more.jsonl", rows(2, start=5)), "seed": 6},
                Plan(seed=6, lease_seconds=240, gold_share=0.0),
            ),
        ):
            add_items(store, asked(tmp_path, **settings))
            assert store.plan == planned


def test_max_prompts_draws_with_the_seed(tmp_path, write):
    file = write("items.jsonl", rows(30))
    drawn = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        config = LabelRecipe(store=str(tmp_path / name), candidates=file, max_prompts=6, seed=seed)
        with Store(config.store) as store:
            add_items(store, config)
            drawn.append([item.prompt[0]["content"] for item in store.items()])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 6


def test_candidates_are_sampled_with_their_provenance_and_can_be_drawn_again(
    tmp_path, write, tiny_model, tiny_tokenizer
):
    import torch

    from rlhf import chat, evaluate
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.rows.records import Prompt
    from rlhf.run.fingerprint import of_path
    from rlhf.sampling.decode import TransformersEngine
    from rlhf.sampling.engine import RowGenerator, model_stop_ids

    policies = [str(save_base(tmp_path / "one", tiny_model, tiny_tokenizer))]
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(3)
    policies.append(str(save_base(tmp_path / "two", tiny_model, tiny_tokenizer)))
    prompts = [{"prompt": f"Count to {word}", "answer": word} for word in ("two", "three", "four")]
    config = asked(
        tmp_path, prompts=write("prompts.jsonl", prompts), policies=policies, candidates_per_prompt=4, max_new_tokens=6,
        temperature=1.3, bf16=False, seed=4,
    )  # fmt: skip
    with Store(config.store) as store:
        add_items(store, config)
        items = store.items()
    assert [item.columns["answer"] for item in items] == ["two", "three", "four"]
    made = [candidate for item in items for candidate in item.candidates]
    assert {c.policy for c in made} == set(policies)
    assert all(c.fingerprint == of_path(c.policy) for c in made)
    assert all(c.sampler == {"temperature": 1.3, "top_p": 1.0, "max_new_tokens": 6} for c in made)
    assert len({c.seed for c in made}) == len(made)
    orders = {tuple(c.policy for c in item.candidates) for item in items}
    assert len(orders) > 1  # the stored order says nothing about who wrote which
    item = items[1]  # one response alone, from what is stored of it
    one = item.candidates[0]
    tokenizer, model = load_tokenizer(one.policy), load_policy(one.policy)
    engine = TransformersEngine(model, model_stop_ids(model, tokenizer), chat.pad_id(tokenizer))
    again = evaluate.sample_policy(
        [Prompt(item.prompt)], tokenizer, engine, max_new_tokens=6, temperature=1.3,
        generator=RowGenerator.of([one.seed], 0, "cpu"),
    )  # fmt: skip
    assert again.responses == (one.text,)


# -- who is invited ----------------------------------------------------------------------------------------


def test_links_are_made_once_and_end_when_new_ones_are_asked_for(tmp_path, capsys):
    names = [named(text) for text in ("anna", "grader:model", "time: 12:30")]
    assert names == [("anna", "person"), ("grader", "model"), ("time: 12:30", "person")]
    with Store(tmp_path / "labels.db") as store:
        invite(store, names, "http://127.0.0.1:8000", renew=False)
        said = capsys.readouterr().out
        (token,) = re.findall(r"http://127\.0\.0\.1:8000/#invite=(\S+)", said.partition("grader")[0])
        assert store.annotator_of(token).name == "anna"
        (other,) = re.findall(r"with the token (\S+)", said)
        assert store.annotator_of(other).kind == "model"
        invite(store, names, "http://127.0.0.1:8000", renew=False)
        assert "#invite=" not in capsys.readouterr().out
        assert store.annotator_of(token) is not None
        invite(store, names[:1], "http://127.0.0.1:8000", renew=True)
        assert store.annotator_of(token) is None
        assert store.annotator_of(other) is not None


# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prompts": "p.jsonl"}, "policies: got none"),
        ({"policies": ["a"]}, "policies: there are no prompts"),
        ({"prompts": "p.jsonl", "candidates": "c.jsonl", "policies": ["a"]}, "name one of them"),
        (
            {"prompts": "p.jsonl", "policies": ["a", "b"], "candidates_per_prompt": 5},
            "must divide candidates_per_prompt=5",
        ),
        ({"prompts": "p.jsonl", "policies": ["a"], "candidates_per_prompt": 10}, "the page ranks 2 to 9"),
        ({"prompts": "p.jsonl", "policies": ["a", "a"]}, "a is given twice"),
        ({"overlap": 0}, "overlap=0 must be at least 1"),
        ({"overlap": 2}, "overlap=2: it is for new items"),
        ({"annotators": ["anna", "ben", "anna:model"]}, "annotators: anna is named twice"),
        ({"gold_share": 1.0}, "gold_share=1.0"),
        ({"lease_minutes": 0.0}, "lease_minutes=0.0"),
        ({"lease_minutes": math.inf}, "lease_minutes=inf must be above 0, and finite"),
        ({"lease_minutes": 1e308}, "lease_seconds=inf must be above 0, and finite"),
        ({"temperature": math.inf}, "temperature=inf must be above 0, and finite"),
        ({"allow_no_token": True}, "every annotator has a token"),
        ({"link_address": "labels.example.org"}, "link_address"),
    ],
)
def test_settings_that_cannot_be(flags, says):
    with pytest.raises(InputError, match=re.escape(says)):
        LabelRecipe(store="labels.db", **flags)


def test_mistakes_are_told_before_anything_is_stored(tmp_path, write):
    too_few = asked(tmp_path, candidates=write("items.jsonl", rows(2)), calibration=3)
    with Store(too_few.store) as store:
        with pytest.raises(InputError, match="calibration=3: there are 2 items"):
            add_items(store, too_few)
        gold = write("gold.jsonl", [{**rows(1)[0], "ranks": [1, 2, 3]}])
        with pytest.raises(InputError, match="gold: 1 prompts are also among the items"):
            add_items(store, asked(tmp_path, candidates=too_few.candidates, gold=gold))
        assert store.items() == []


def test_the_command_serves_and_ends_with_a_line(tmp_path, write):
    write("items.jsonl", rows(2))
    (tmp_path / "project.yaml").write_text("title: My project\nflags: []\n")
    command = [sys.executable, "-m", "rlhf.cli", "label", "--store", "labels.db", "--candidates", "items.jsonl",
               "--project", "project.yaml", "--annotators", "[anna]", "--port", "0", "--output_dir", "out"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment.pop("RLHF_SERVER_TOKEN", None)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = ""
        while "ends it" not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        (link,) = re.findall(r"http://127\.0\.0\.1:\d+/#invite=\S+", said)
        url, token = link.split("/#invite=")
        headers = {"Authorization": f"Bearer {token}"}
        assert call(url, "/api/project", **headers)[1]["title"] == "My project"
        (task,) = call(url, "/api/next", {}, **headers)[1]["tasks"]
        ranks = {str(shown["id"]): 1 for shown in task["candidates"]}
        answer = {"assignment": task["assignment"], "submission": "0" * 32, "ranks": ranks}
        assert call(url, "/api/judgments", answer, **headers)[0] == 200
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert token not in errors
    assert "1 judgments of 2 items" in rest
    assert "rlhf collected status --store labels.db" in rest
    found = json.loads((tmp_path / "out" / "label.json").read_text())
    assert found["metrics"]["judgments"] == {"value": 1, "low": None, "high": None, "n": 2}
    assert found["annotators"]["anna"]["done"] == 1


def test_a_store_without_items_is_told(tmp_path, write, capsys):
    with Store(tmp_path / "labels.db") as store:
        add_items(store, asked(tmp_path))
        assert "nothing is to be labelled in" in capsys.readouterr().out
        add_items(store, asked(tmp_path, candidates=write("items.jsonl", rows(2))))
        add_items(store, asked(tmp_path))
        assert "nothing is to be labelled" not in capsys.readouterr().out


def test_a_package_that_is_missing_is_told_before_anything_is_sampled(tmp_path, write, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else known(name))
    monkeypatch.setattr("rlhf.run.connections.run", lambda *given: pytest.fail("it serves"))
    config = asked(tmp_path, candidates=write("items.jsonl", rows(3)), annotators=["anna"], port=0)
    with pytest.raises(InputError, match=r"a server needs uvicorn: pip install 'rlhf-recipes\[server\]'"):
        label.serve(config)
    assert not (tmp_path / "labels.db").exists()


def test_nobody_could_enter(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_SERVER_TOKEN", raising=False)
    with pytest.raises(InputError, match="nobody could enter"):
        label.serve(asked(tmp_path, port=0))
    assert configs.load(LabelRecipe, ["--store", "x", "--annotators", "[anna, ben:model]"]).annotators == [
        "anna", "ben:model",
    ]  # fmt: skip


def test_behind_a_proxy_its_name_is_expected(tmp_path):
    config = label.behind_proxy(asked(tmp_path, link_address="https://labels.example.org/here"))
    assert config.allowed_hosts == ["labels.example.org"]
    assert label.behind_proxy(asked(tmp_path)).allowed_hosts is None
    assert label.behind_proxy(asked(tmp_path, link_address="http://[::1]:80")).allowed_hosts == []
