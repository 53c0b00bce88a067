"""recipes/moderation.py: what training writes, judging with what it trained, filtering, guards, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import recipe
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from reward_models import ModerationModel
from rlhf.run.stages import Manifest

WORDS = ("cat", "dog", "bird", "tree", "house", "sun")
SMALL = ("--bf16", "false", "--preflight", "false")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "user", "assistant", ":"]
    torch.manual_seed(0)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(words), **size, max_position_embeddings=64)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: n for n, word in enumerate(words)}).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw, found = random.Random(seed), []
    for n in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 8))]
        found.append({"prompt": f"{' '.join(words)} {seed} {n}", "dog": int("dog" in words), "source": "ab"[n % 2]})
        if n % 4:
            found[-1]["bird"] = int("bird" in words)
    return found


def write(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def run(*flags: object, code: int = 0) -> recipe.Result:
    result = recipe.run("moderation", *flags)
    assert result.code == code, result.out + result.err
    return result


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    held_out = rows(60, 2)
    train = write(folder / "train.jsonl", [*rows(120, 1), held_out[0] | {"dog": 1 - held_out[0]["dog"]}])
    given = ("--model", base, "--train_data", train, "--eval_data", write(folder / "held_out.jsonl", held_out))
    told = run(*given, "--output_dir", folder / "moderation", "--calibration_share", "0.2", *SMALL)
    assert "left out 1 of 121 texts that are held out, too" in told.out + told.err
    assert "learning_rate" not in told.out + told.err  # the head is fitted in closed form
    again = run(*given, "--output_dir", folder / "moderation", "--calibration_share", "0.2", *SMALL)
    assert "complete, skipped" in again.out + again.err
    refused = run(*given, "--output_dir", folder / "moderation", *SMALL, code=2)
    assert "belongs to another run" in refused.err
    return folder


def test_what_training_writes(trained):
    folder = trained / "moderation"
    written = json.loads((folder / "moderation.json").read_text())
    for name, count in (("dog", 60), ("bird", 45)):
        metric = written["metrics"][f"auprc/{name}"]
        assert set(metric) == {"value", "low", "high", "n"}
        assert metric["n"] == count
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert f"auprc_bag_of_words/{name}" in written["metrics"]
    assert written["metrics"]["auprc/dog"]["value"] > 0.9
    assert {row["name"] for row in written["report"]["by_source"]} == {"source: a", "source: b"}
    manifest = Manifest.read(folder)
    assert manifest.stage == "moderation"
    assert manifest.outputs["auprc/dog"] == written["metrics"]["auprc/dog"]["value"]
    assert (folder / "moderation_report.html").is_file()
    about = ModerationModel.load(folder, device="cpu").about
    assert about.names == ["dog", "bird"]
    assert about.wanted_false_positive_rate == 0.01
    assert all(category.negatives > 0 and category.threshold != 0.5 for category in about.categories)
    assert any(category.scale != 1 for category in about.categories)


def test_judging_gives_the_same_numbers_and_divides_the_rows(trained, tmp_path):
    out = tmp_path / "judged"
    run("--model", trained / "moderation", "--eval_data", trained / "held_out.jsonl", "--output_dir", out)
    both = [json.loads((folder / "moderation.json").read_text())["metrics"] for folder in (trained / "moderation", out)]
    for name in ("auprc/dog", "auprc/bird", "false_positive_rate/dog", "flagged_share"):
        assert both[1][name] == pytest.approx(both[0][name], abs=1e-5), name
    judged, kept, flagged = ([json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                             for name in ("judged", "kept", "flagged"))  # fmt: skip
    held_out = rows(60, 2)
    assert len(judged) == 60
    assert [row for row in held_out if row in kept] == kept
    assert len(kept) + len(flagged) == 60
    assert all(row["moderation"]["flagged"] for row in flagged)
    assert {name for row in judged for name in row["scores"]} == {"dog", "bird"}
    given = ("--model", trained / "moderation", "--eval_data", trained / "held_out.jsonl", "--output_dir")
    for more in ((), ("--overwrite", "true")):
        assert "holds a trained model" in run(*given, trained / "moderation", *more, code=2).err
    again = run(*given, out)
    assert "judged        complete, skipped" in again.out + again.err
    other = ("--model", trained / "moderation", "--eval_data", trained / "train.jsonl", "--output_dir", out)
    assert "belongs to another run: eval_data" in run(*other, code=2).err
    run(*other, "--overwrite", "true")
    assert len((out / "judged.jsonl").read_text().splitlines()) == 121


def test_pairs_and_plain_texts_are_filtered_too(trained, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "cat", "chosen": "tree", "rejected": "dog dog"}, {"text": "sun"}])
    wrong = write(tmp_path / "wrong.jsonl", [{"text": "sun", "dog": 0}, {"text": "cat", "dog": "yes"}])
    refused = run("--model", trained / "moderation", "--eval_data", wrong, "--output_dir", tmp_path / "out", code=2)
    assert "wrong.jsonl:2: dog: got 'yes'; write 1 or true" in refused.err
    assert not (tmp_path / "out").exists()
    told = run("--model", trained / "moderation", "--eval_data", data, "--output_dir", tmp_path / "out")
    assert "Nothing is measured: no label is known of the 2 texts." in told.out + told.err
    written = json.loads((tmp_path / "out" / "moderation.json").read_text())
    assert written["metrics"]["flagged_share"]["n"] == 2
    assert "auprc/dog" not in written["metrics"]


def test_a_category_that_cannot_be_learned_is_named():
    from reward_models.labelled_texts import read_labelled

    one_sided = recipe.load("moderation").one_sided
    rows = read_labelled([{"text": "a", "S": 0, "H": 1, "V": 1}, {"text": "b", "S": 0, "H": None, "V": 0}])
    assert one_sided(rows, ["S", "H", "V"]) == [
        "nothing is learned of H: of the training texts whose label is known, all have it",
        "nothing is learned of S: of the training texts whose label is known, none has it",
    ]


def test_texts_that_weigh_nothing_decide_no_threshold(base, tmp_path):
    train, held_out = write(tmp_path / "train.jsonl", rows(60, 1)), write(tmp_path / "held_out.jsonl", rows(30, 2))
    wrong = [row | {"dog": 1 - row["dog"], "weight": 0} for row in rows(90, 4)]
    for name, calibration in (("alone", rows(40, 3)), ("both", [*wrong, *rows(40, 3)])):
        file = write(tmp_path / f"{name}.jsonl", calibration)
        given = ("--model", base, "--train_data", train, "--eval_data", held_out, "--calibration_data", file)
        run(*given, "--output_dir", tmp_path / name, *SMALL)
    for file in ("categories.json", "moderation.json"):  # the card's bag of words, too
        both = [json.loads((tmp_path / name / file).read_text()) for name in ("alone", "both")]
        assert flat(both[1]) == pytest.approx(flat(both[0]), abs=1e-9)
    more = ("--labeler_weights", json.dumps({"ann": 1}), "--output_dir", tmp_path / "out")
    assert "train.jsonl:1: no column labeler" in run(*given, *more, *SMALL, code=2).err
    assert not (tmp_path / "out").exists()


def flat(content: Any, name: str = "") -> dict[str, float]:
    """The numbers of a JSON value, by their places."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = {key: number for part, value in items for key, number in flat(value, f"{name}/{part}").items()}
    return found | ({name: content} if isinstance(content, int | float) else {})


def test_mistakes(base, trained, tmp_path):
    data = trained / "train.jsonl"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--model", base), "train_data and eval_data: name one"),
        (("--model", base, "--eval_data", data), "holds no moderation model"),
        (("--model", base, "--train_data", data, "--guard", "llama_guard"), "a guard of others is asked, not trained"),
        (("--model", base, "--eval_data", data, "--guard", "safeguard"), "policy: name a safeguard's policy file"),
        (("--model", base, "--train_data", data, "--false_positive_rate", "0"), "must be above 0 and below 1"),
        (("--model", base, "--train_data", data, "--categories", "[cow]"), "categories: no text has a label of cow"),
        (
            ("--model", base, "--train_data", data, "--learning_rate", "1e-4"),
            "learning_rate=0.0001: with trains=head no",
        ),
        (("--model", base, "--train_data", data, "--threshold", "2"), "threshold=2.0 must be above 0 and below 1"),
        (
            ("--model", trained / "moderation", "--eval_data", data, "--threshold", "0.9"),
            "threshold=0.9: it is a guard's",
        ),
        (("--model", trained / "moderation", "--train_data", data), "made by stage 'moderation'"),
    ]
    for flags, message in cases:
        refused = run(*flags, "--output_dir", tmp_path / "out", code=2)
        assert message in refused.err, refused.err
        assert not (tmp_path / "out").exists()


def test_a_guard_is_measured_on_any_label(tmp_path, monkeypatch):
    from reward_models import guards
    from rlhf.evals.asks import Answered, NoAnswer

    def ask(questions, choices):
        texts = [question[-1]["content"] for question in questions]
        return [NoAnswer("?") if "sun" in text else Answered((0.9, 0.1) if "dog" in text else (0.1, 0.9), 1.0, None)
                for text in texts]  # fmt: skip

    monkeypatch.setattr(guards.asks, "load", lambda model, **settings: ask)
    data = write(tmp_path / "rows.jsonl", [
        {"prompt": "dog", "S": 1, "H": 0}, {"prompt": "cat", "S": 0}, {"prompt": "sun", "H": 0}, {"prompt": "tree"},
    ])  # fmt: skip
    told = run(
        "--model", "http://127.0.0.1:9", "--guard", "llama_guard", "--eval_data", data, "--output_dir", tmp_path / "out"
    )
    assert "1 of these rows are flagged because the guard answered outside its format" in told.out + told.err
    metrics = json.loads((tmp_path / "out" / "moderation.json").read_text())["metrics"]
    assert metrics["auprc/unsafe"]["n"] == 3
    assert metrics["flagged_share"]["value"] == 0.5  # the one without an answer, too
    assert metrics["auprc/unsafe"]["value"] == 0.5  # which is no harm, and scores highest


def test_calibration_keeps_a_heads_offset():
    from types import SimpleNamespace

    import numpy as np

    from reward_models.labelled_texts import read_labelled
    from reward_models.moderation import About, Category

    stub: Any = SimpleNamespace(
        about=About(categories=(Category(name="S", offset=-3.0),), max_length=24), categories=["S"],
        logits=lambda texts: np.array([[float(len(text) - 2)] for text in texts]),
        with_categories=lambda categories, wanted: categories,
    )  # fmt: skip
    (category,) = recipe.load("moderation").calibrated(
        stub, read_labelled([{"text": "a", "S": 0}, {"text": "abcd", "S": 1}, {"text": "ab", "S": 0}]), 0.01
    )
    assert (category.offset, category.negatives, category.flagged) == (-3.0, 2, 0)
    assert category.threshold > 0.5
