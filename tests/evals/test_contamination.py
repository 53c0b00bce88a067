"""Planted copies found or not as defined, against a slow search; no false hit in a million windows; the recipe."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from reference import recipe

from rlhf.errors import InputError
from rlhf.evals import windows
from rlhf.evals.contamination import Found, Rules, holding, item_of, search, summary, texts_in
from rlhf.evals.windows import Sought, letters_of, owners, prefix_sums, words_of

ITEM = (
    "In the spring of 1847 the harbour master counted 212 ships, and wrote in his ledger that no year before had "
    "brought so many masts into the bay at once."
)
OTHER = "Quite another question, about the growth of mushrooms in damp cellars and why their caps turn brown in frost."


def planted(text: str) -> list[tuple[str, str]]:
    return [("train:1", "Nothing to see here."), ("train:2", f"Before it. {text} And after it.")]


@pytest.mark.parametrize(
    ("copy", "by_letters", "by_words"),
    [
        (ITEM, True, True),  # verbatim
        (ITEM.replace(" ", "  \n "), True, True),  # respaced
        (re.sub(r"[,.]", " --", ITEM), True, True),  # other punctuation
        (" ".join(ITEM.replace(" ", "")), True, False),  # every letter a word: letters don't see it, words do
        (ITEM[:70] + "X" + ITEM[71:], True, True),  # one character changed
        (ITEM.replace("1847", "1911").replace("212", "340"), True, False),  # digits changed: a third of its words lost
        (ITEM.upper(), False, True),  # letters are compared as they are, words in small letters
        (ITEM[:40] + " and then nothing more", False, False),  # less than 50 letters
        ("The harbour had never seen as many ships as in that spring, its master noted.", False, False),  # a paraphrase
    ],
)
def test_a_planted_copy(copy, by_letters, by_words):
    found, other, short = search(planted(copy), [ITEM, OTHER, "2 + 2?"], Rules())
    assert (found.windows, found.words) == (by_letters, by_words)
    assert found.train == ("train:2" if by_letters or by_words or found.words_covered else None)
    assert (other.windows, other.words, other.letters_covered) == (False, False, 0.0)
    assert short == Found(), "too short to tell"


def test_what_many_items_share_is_no_part_of_what_a_copy_covers():
    """31 words of instructions before 12 of an item's own: its copy covers those 12, with the instructions or alone."""
    shared = " ".join(f"instruct{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(31))
    own = [" ".join(f"own{chr(97 + n % 26)}{chr(97 + n // 26)}{chr(97 + k)}" for k in range(12)) for n in range(30)]
    items = [f"{shared} {text}" for text in own]
    half = " ".join(own[2].split()[:8])
    found = search([("t:0", items[0]), ("t:1", own[1]), ("t:2", half), ("t:3", shared)], items, Rules())
    assert [(one.words, one.words_covered) for one in found[:4]] == [
        (True, 1.0), (True, 1.0), (False, pytest.approx(8 / 12)), (False, 0.0),
    ]  # fmt: skip
    assert [one.letters_covered for one in found[:2]] == [1.0, 1.0]
    whole = search([("t", f"{shared} {shared}")], [f"{shared} {shared}"] * 2 + [f"{shared} {n}" for n in own], Rules())
    assert whole[0].words_covered == 1.0, "boilerplate twice: what is its own is how the two meet"


def test_every_text_that_holds_an_item_is_named():
    texts = ["Nothing.", f"One. {ITEM}", OTHER, f"{ITEM} Two.", ITEM[:45], f"Three: {ITEM[20:90]}"]
    assert holding(texts, [ITEM], Rules()) == {1, 3, 5}
    assert holding(texts, [ITEM, OTHER], Rules()) == {1, 2, 3, 5}
    assert holding(texts, [], Rules()) == holding([], [ITEM], Rules()) == set()


def slow(stream: list[tuple[str, str]], text: str, size: int) -> list[bool]:
    """Which windows of a text are in the stream, by Python's `in`."""
    kept = ["".join(c for c in part if c.isalnum()) for _, part in stream]
    own = "".join(c for c in text if c.isalnum())
    return [any(own[n : n + size] in part for part in kept) for n in range(len(own) - size + 1)]


@pytest.mark.parametrize("seed", range(6))
def test_every_window_against_a_slow_search(seed):
    draw = random.Random(seed)
    alphabet = "ab 1é漢.\n" if seed % 2 else "abcdefgh ,"
    text = lambda n: "".join(draw.choice(alphabet) for _ in range(n))  # noqa: E731
    items = [text(draw.randrange(5, 200)) for _ in range(12)]
    stream = [(f"t:{n}", text(50) + draw.choice(items)[draw.randrange(40) :] + text(30)) for n in range(10)]
    rules = Rules(chars=12, samples=10**6, min_chars=1)
    for item, found in zip(items, search(stream, items, rules), strict=True):
        own = sum(c.isalnum() for c in item)
        hits = slow(stream, item, min(12, own)) if own else []
        assert found.windows == (any(hits) if own else None)
        assert found.sampled == found.windows, "all windows are drawn"
        covered = {n + k for n, hit in enumerate(hits) if hit for k in range(min(12, own))}
        assert found.letters_covered == pytest.approx(len(covered) / own if own else 0.0)


def test_three_random_substrings_are_three_windows():
    """Of a copy of a tenth of a long item three draws find about 1 - 0.9^3 (its windows are fewer than its letters)."""
    draw = random.Random(0)
    items = ["".join(draw.choice("abcdefghijklmnop") for _ in range(1050)) for _ in range(250)]
    stream = [("t", item[:150]) for item in items]  # 101 of 1,001 windows
    found = search(stream, items, Rules())
    assert all(one.windows for one in found)
    assert 0.20 < np.mean([one.sampled for one in found]) < 0.35  # 1 - (900/1001)^3 = 0.273
    again, other = search(stream, items[39::-1], Rules()), search(stream, items[:40], Rules(seed=1))
    assert [one.sampled for one in again] == [one.sampled for one in found[39::-1]], "an item's draw is its own"
    assert [one.sampled for one in other] != [one.sampled for one in found[:40]]


def test_no_false_hit_in_a_million_windows():
    draw = np.random.default_rng(0)
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    items = ["".join(draw.choice(letters, 1000)) for _ in range(50)]
    stream = [(f"t:{n}", "".join(draw.choice(letters, 10_000))) for n in range(101)]
    found = search(stream, items, Rules())
    assert not any(one.windows or one.words for one in found)
    assert sum(len(text) - 49 for _, text in stream) > 1_000_000


def test_a_collision_of_hashes_is_no_hit(monkeypatch):
    """With all hashes equal every window passes the table; the letters decide."""
    monkeypatch.setattr(windows, "window_hashes", lambda sums, size: np.zeros(max(0, len(sums) - size), np.uint64))
    item, alone = letters_of("abcdefgh"), (np.array([0]), np.array([10]))
    sought = Sought(item, owners(item, np.arange(1)), 4, *alone)
    stream = letters_of("efghxabcd")
    sought.look(stream, prefix_sums(stream.values), owners(stream, np.arange(1)), ["t"])
    # one number for all windows of the item; its first is "abcd", which stands at the end of the stream
    assert sought.places == ["t"]
    other = letters_of("xxxxxxxxx")
    sought = Sought(item, owners(item, np.arange(1)), 4, *alone)
    sought.look(other, prefix_sums(other.values), owners(other, np.arange(1)), ["t"])
    assert sought.places == []


def test_words_and_letters_by_hand():
    def words(text: str) -> list[str]:
        found = words_of(text)
        return ["".join(map(chr, found.letters[b:e])) for b, e in zip(found.begin, found.end, strict=True)]

    assert words("It's 3.5 ÉTÉ!") == ["it", "s", "3", "5", "été"]
    assert "".join(map(chr, letters_of("It's 3.5 ÉTÉ!").letters)) == "Its35ÉTÉ"
    one, other = words_of("hello World"), words_of("x hello y world")
    assert one.values.tolist() == other.values[[1, 3]].tolist(), "a word's hash is its own, wherever it stands"


def test_the_tables_hold_every_letter_of_every_script():
    assert not any(chr(n).isalnum() for n in range(windows.LAST, 0x110000))


def test_a_window_never_crosses_two_texts_and_a_long_text_is_cut_with_overlap():
    half = ITEM[: len(ITEM) // 2]
    (found,) = search([("a", half), ("b", ITEM[len(half) :])], [ITEM], Rules(chars=100))
    assert found.windows is False
    for at in (windows.CHUNK - 60, windows.CHUNK - windows.OVERLAP - 30, 3 * windows.CHUNK):
        long = "zq" * (at // 2) + ITEM + "zq" * windows.CHUNK
        (found,) = search([("a", long)], [ITEM], Rules())
        assert found.letters_covered == 1.0


def test_boilerplate_is_neither_sought_nor_sampled():
    head = "Read the passage below with care and answer the question that follows it in one word only, please: "
    items = [f"{head}what is the colour of thing number {n} in the box of the {n * 7919} drawers?" for n in range(30)]
    found = search([("t", head)], [*items, head], Rules())
    assert [one.windows for one in found[:-1]] == [False] * 30
    assert found[-1].windows is None, "nothing of it is its own"
    assert search([("t", items[3])], items, Rules())[3].sampled is True


def test_what_is_found_of_an_eval_does_not_depend_on_another():
    """40 items share instructions that the training data hold; a tenth of them are copied. Beside it a larger eval,
    which has its own boilerplate, and three of the items."""
    draw = random.Random(0)
    words = lambda n: " ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(n))  # noqa: E731
    head, other = words(12), words(12)
    small = [f"{head} {words(12)}" for _ in range(40)]
    large = [f"{other} {words(12)}" for _ in range(800)] + small[:3]
    stream = [("t:0", f"{head} {words(30)}"), ("t:1", other), *((f"t:{n}", small[n]) for n in (2, 5, 6, 9))]
    alone, beside = search(stream, small, Rules()), search(stream, large, Rules())
    assert [n for n, one in enumerate(alone) if one.windows and one.words] == [2, 5, 6, 9]
    assert [one.windows for one in beside[-3:]] == [True] * 3, "rare there, and in the training data"
    together = search(stream, [*small, *large], Rules(), ["small"] * 40 + ["large"] * 803)
    assert together == alone + beside


# --------------------------------------------------------------------------------------------- items and scores


@pytest.mark.parametrize(
    ("row", "text", "score"),
    [
        ({"prompt": "Why?", "ideal": "x", "score": 0.5}, "Why?", 0.5),
        ({"input": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "correct": True}, "U", 1.0),
        ({"question": "Q", "choices": ["a"]}, "Q", None),
        ({"a": "x", "b": ["y", {"c": "z"}]}, "x\ny\nz", None),
        ({"eval": "e", "prompt": "P", "trials": [{"numbers": {"a": 1.0}}, {"numbers": {"a": 0.0}}]}, "P", 0.5),
        ({"eval": "e", "prompt": "P", "trials": [{"numbers": {"choice_A": 1.0}}]}, "P", None),
    ],
)  # fmt: skip
def test_an_items_text_and_score(row, text, score):
    item = item_of(row, "name", "f:1")
    assert (item.text, item.score) == (text, score)
    assert item.eval == row.get("eval", "name")
    assert list(texts_in({"a": ["x", {"b": "y"}], "n": 3})) == ["x", "y"]
    with pytest.raises(InputError, match="f:1: score is 'high'"):
        item_of({**row, "trials": None, "score": "high", "correct": None}, "name", "f:1")


def test_scores_with_and_without():
    items = [item_of({"prompt": f"p{n}", "score": n < 12}, "e", f"f:{n}") for n in range(20)]
    found = [Found(n < 10, n < 10, None, 1.0, 0.0, None) for n in range(20)]
    entry = summary(items, found)["e"]
    assert entry["sampled"]["share"]["value"] == 0.5
    assert "words" not in entry
    scores = {name: entry["windows"][name]["value"] for name in entry["windows"] if name != "share"}
    assert scores == {"score_all": 0.6, "score_clean": 0.2, "score_contaminated": 1.0, "contaminated_less_clean": 0.8}
    apart = entry["windows"]["contaminated_less_clean"]
    assert 0 < apart["low"] < 0.8 < apart["high"] <= 1
    unscored = summary([*items, item_of({"prompt": "q"}, "e", "f")], [*found, Found(True, True)])["e"]["sampled"]
    assert unscored["share"]["n"] == 21
    assert unscored["score_all"] == entry["sampled"]["score_all"]
    assert unscored["contaminated_less_clean"] == {**entry["sampled"]["contaminated_less_clean"], "n": 20}
    nobodys = [item_of({"prompt": f"p{n}"}, "e", f"f:{n}") for n in range(20)]
    assert set(summary(nobodys, found)["e"]["sampled"]) == {"share"}


# ---------------------------------------------------------------------------------------------------- the recipe


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_recipe(tmp_path: Path):
    sft = write(
        tmp_path / "sft.jsonl",
        [{"messages": [{"role": "user", "content": ITEM}, {"role": "assistant", "content": "ok"}]}],
    )
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": OTHER, "rejected": "no"}] * 2)
    mine = write(
        tmp_path / "mine.jsonl",
        [{"prompt": ITEM, "ideal": "a", "score": 1}, {"prompt": "<b>" + "other " * 20, "score": 0}],
    )
    runs = tmp_path / "evals"
    runs.mkdir()
    (runs / "run_evals.json").write_text("{}")
    write(runs / "items.jsonl", [{"eval": "qa", "key": "k", "prompt": [{"role": "user", "content": OTHER}],
                                  "trials": [{"numbers": {"accuracy": 1.0}}]}])  # fmt: skip
    words = [
        "--train_data",
        f"{sft},{pairs}",
        "--eval_data",
        f"{mine},{runs / 'run_evals.json'}",
        "--output_dir",
        tmp_path / "out",
    ]
    result = recipe.run("contamination", *words)
    assert (result.code, result.err) == (0, "")
    assert "mine: sampled 50.0% of 2" in result.out
    assert "a paraphrase, a translation" in result.out
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert found["metrics"]["qa/windows"]["value"] == 1.0
    assert found["metrics"]["mine/sampled"]["n"] == 2
    assert found["rows"] == 3
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [item["train"] for item in items] == [f"{sft}:1", None, f"{pairs}:1"]
    shown = (tmp_path / "out" / "contamination.html").read_text()
    assert "score clean" in shown
    assert "<b>other" not in shown
    for flags, told in (
        (("--eval_data", tmp_path / "none.jsonl"), "no such file"),
        (("--chars", 3), "chars=3 must be at least 8"),
        (("--eval_data", write(tmp_path / "e.jsonl", [{"n": 3}])), "e.jsonl:1: no text"),
        (
            ("--eval_data", f"{mine},{write(tmp_path / 'out' / 'mine.jsonl', [{'prompt': OTHER}])}"),
            "both have an eval called 'mine'; give one file another name",
        ),
        (("--coverage", 2), "coverage=2.0 must be above 0 and at most 1"),
    ):
        refused = recipe.run("contamination", *words, *flags)
        assert refused.code == 2
        (line,) = refused.err.splitlines()
        assert told in line


@pytest.mark.long
def test_a_hundred_megabytes_in_a_minute(tmp_path: Path):
    """With a thousand eval items, a tenth of them planted."""
    draw = np.random.default_rng(0)
    vocabulary = ["".join(draw.choice([*"abcdefghijklmnopqrstuvwxyz"], size)) for size in draw.integers(2, 9, 20_000)]
    texts = [" ".join(vocabulary[w] for w in draw.integers(0, 20_000, 300)) for _ in range(2000)]
    evals = [" ".join(vocabulary[w] for w in draw.integers(0, 20_000, 100)) for _ in range(1000)]
    size, rows = 0, tmp_path / "train.jsonl"
    with rows.open("w") as file:
        for n in range(10**6):
            text = texts[n % 2000] if n % 50 else evals[n // 50 % 100]
            size += file.write(json.dumps({"prompt": f"{n} {text}", "completion": texts[(n * 7) % 2000]}) + "\n")
            if size > 100_000_000:
                break
    items = write(tmp_path / "evals.jsonl", [{"prompt": text} for text in evals])
    began = time.process_time()
    result = recipe.run("contamination", "--train_data", rows, "--eval_data", items, "--output_dir", tmp_path / "out")
    seconds = time.process_time() - began
    assert (result.code, result.err) == (0, "")
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())["metrics"]
    assert all(found[f"evals/{method}"]["value"] == 0.1 for method in ("sampled", "windows", "words"))
    assert seconds < 60
