"""The world of steps: the files that make() writes, labels and gold by hand, the labelers' slips."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward_models.steps import first_error, read_steps

WORLD = Path(__file__).parents[2] / "data" / "toy_steps"
SIZES = {
    "prompts": 120, "demonstrations": 80, "pretraining_documents": 200, "evaluation_prompts": 40, "solutions": 400,
    "held_out_solutions": 80,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def world_on_path() -> Iterator[None]:
    sys.path.append(str(WORLD))
    yield
    sys.path.remove(str(WORLD))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import toy_steps_world

    folder = tmp_path_factory.mktemp("toy_steps")
    toy_steps_world.make(folder, 3, **SIZES)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_bytes_other_seed_other_bytes(small: Path, tmp_path: Path) -> None:
    import toy_steps_world

    def digests(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    assert toy_steps_world.make(tmp_path / "again", 3, **SIZES)["steps"] == 400
    toy_steps_world.make(tmp_path / "other", 4, **SIZES)
    assert digests(tmp_path / "again") == digests(small)
    assert all(digests(tmp_path / "other")[name] != digest for name, digest in digests(small).items())


def test_no_problem_is_in_two_files(small: Path) -> None:
    texts = {
        name: [row["prompt"][0]["content"] for row in rows(small / f"{name}.jsonl")]
        for name in ("eval_prompts", "demonstrations", "prompts", "steps", "steps_held_out")
    }
    everything = [text for listed in texts.values() for text in listed]
    assert len(set(everything)) == len(everything) == 40 + 80 + 120 + 400 + 80
    told = {turn["content"] for row in rows(small / "pretraining.jsonl") for turn in row.get("messages", [])}
    assert told
    assert not told & {*texts["eval_prompts"], *texts["steps_held_out"]}


def test_who_forgets_to_borrow_is_ten_too_high_there_and_right_elsewhere() -> None:
    import toy_steps_gold
    from toy_steps_problems import forgetful_steps, problem, solution, steps_of

    rng = random.Random(0)
    assert forgetful_steps((12, -5, 4), rng, 1.0) == (["12 - 5 = 17", "17 + 4 = 21", "The answer is 21."], 0)
    assert forgetful_steps((9, 3, -2, -3), rng, 1.0)[0][1:3] == ["12 - 2 = 10", "10 - 3 = 17"]
    forgot = needed = 0
    for _ in range(2000):
        made = problem(rng)
        lines, first = solution(made.numbers, rng, 1.0, 0.6)
        assert toy_steps_gold.first_wrong(lines, list(made.numbers)) == (len(lines) if first is None else first)
        _, at = forgetful_steps(made.numbers, rng, 1.0)
        needed += at is not None
        forgot += first is not None
        assert first is None or lines[: first + 1] != steps_of(made.numbers)[: first + 1]
        assert forgetful_steps(made.numbers, rng, 0.0) == (steps_of(made.numbers), None)
    assert 0.15 < needed / 2000 < 0.5
    assert 0.5 < forgot / needed < 0.8, "some problems need it twice"


def test_held_out_labels_are_true_and_the_labelers_slip(small: Path) -> None:
    import toy_steps_gold

    def slips(name: str) -> float:
        wrong = labels = 0
        for record in read_steps(small / f"{name}.jsonl"):
            true = toy_steps_gold.first_wrong(record.steps, toy_steps_gold.numbers_of(record.columns["facts"]))
            for n, label in enumerate(record.labels):
                if label is not None and n <= true:
                    labels += 1
                    wrong += (label == -1) != (n == true)
        return wrong / labels

    assert slips("steps_held_out") == 0.0
    assert 0.07 < slips("steps") < 0.13
    found = [first_error(record.labels) == len(record.steps) for record in read_steps(small / "steps_held_out.jsonl")]
    assert 0.25 < sum(found) / len(found) < 0.55


def test_a_flawed_solution_has_one_mistake_of_its_own() -> None:
    import toy_steps_gold
    from toy_steps_problems import flawed_steps, problem, steps_of

    rng = random.Random(0)
    for _ in range(500):
        made = problem(rng)
        right = steps_of(made.numbers)
        assert toy_steps_gold.first_wrong(right, list(made.numbers)) == len(right)
        assert toy_steps_gold.gold_parts("\n".join(right), {"numbers": made.numbers})["gold"] == 10.0
        wrong, at = flawed_steps(made.numbers, rng)
        assert toy_steps_gold.first_wrong(wrong, list(made.numbers)) == at
        assert wrong[:at] == right[:at]
        assert wrong[at] != right[at]


FACTS = {"numbers": [7, 5, -3]}
BY_HAND = [
    ("7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.", 3, 10.0),
    ("7 + 5 = 12\n12 - 3 = 8\nThe answer is 8.", 1, 5 / 3),
    ("7 + 5 = 13\n13 - 3 = 10\nThe answer is 9.", 0, 5.0),  # a right answer that does not follow
    ("7 + 3 = 10\n10 - 3 = 7\nThe answer is 7.", 0, 0.0),
    ("7 - 5 = 2\n2 - 3 = -1\nThe answer is -1.", 0, 0.0),
    ("7 + 5 = 12\nThe answer is 12.", 1, 5 / 3),  # a change is left out
    ("7 + 5 = 12\n12 - 3 = 9", 2, 10 / 3),
    ("7 + 5 = 12\n\n12 - 3 = 9\nThe answer is 9.\nThe answer is 9.", 3, 10.0),
    ("The answer is 9.", 0, 5.0),
    ("", 0, 0.0),
    ("nine", 0, 0.0),
]


@pytest.mark.parametrize(("response", "first", "gold"), BY_HAND)
def test_gold_by_hand(response: str, first: int, gold: float) -> None:
    import toy_steps_gold

    assert toy_steps_gold.first_wrong(toy_steps_gold.lines_of(response), FACTS["numbers"]) == first
    facts = [json.dumps(FACTS)]
    assert toy_steps_gold.gold(["?"], [response], facts=facts) == pytest.approx([gold])
    assert toy_steps_gold.gold(["?"], [[{"role": "assistant", "content": response}]], facts=facts)[0] == pytest.approx(
        gold
    )


def test_labelers_by_hand() -> None:
    import toy_steps_labelers as labelers

    steady = random.Random(0)
    assert labelers.label(1, 3, steady, 0.0) == [1, -1, None]
    assert labelers.label(3, 3, steady, 0.0) == [1, 1, 1]
    assert labelers.label(0, 2, steady, 1.0) == [1, -1]  # always the other way round, and stops
    facts = [json.dumps(FACTS)] * 2
    texts = [BY_HAND[0][0], BY_HAND[1][0]]
    assert labelers.label_steps(["?"] * 2, texts, noise=0.0, facts=facts) == [[1, 1, 1], [1, -1, None]]
    ranks = labelers.rank(["?"] * 50, [texts] * 50, seed=0, facts=[facts[0]] * 50)
    assert ranks == labelers.rank(["?"] * 50, [texts] * 50, seed=0, facts=[facts[0]] * 50)
    better = [labelers.rank([str(n)], [texts], seed=0, facts=facts[:1])[0] for n in range(100)]
    assert sum(first < second for first, second in better) > 90
