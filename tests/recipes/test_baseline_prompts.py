"""recipes/baseline_trainers.py, its rows: what trl trains on and samples from is what SFT, PPO and the evals have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import recipe
from reference.templates import ADD, CALLED, RESULT, A, Q, tokenizer_for
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import chat
from rlhf.config import load
from rlhf.errors import InputError
from rlhf.rows.records import Ranking, read_judged
from rlhf_recipes.baseline_config import BaselineConfig
from rlhf_recipes.stage import open_stage

OTHER = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}
ROWS: list[dict[str, Any]] = [
    {"prompt": [Q]},
    {"prompt": [Q, A, Q], "chat_template_kwargs": {"enable_thinking": True}},
    {"prompt": [Q, CALLED, RESULT], "tools": [ADD, OTHER]},
    {"prompt": [Q], "tools": json.dumps([OTHER]), "chat_template_kwargs": {"unread": [1, "b"]}},
]
SIZES = {"batch_size": 4, "microbatch_size": 2, "updates": 1, "rollout_size": 8, "generations": 4}


def base(folder: Path, template: str, kwargs: dict[str, Any] | None, **generation: Any) -> Path:
    tokenizer = chat.set_template_kwargs(tokenizer_for(template), kwargs)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def built(folder: Path, method: str, model: Path, rows: list[dict[str, Any]], *flags: object) -> Any:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "one.py").write_text("def one(completions, **others):\n    return [1.0 for _ in completions]\n")
    given = ["--method", method, "--model", model, "--train_data", folder / "rows.jsonl", "--bf16", "false",
             "--max_length", 4096, "--max_prompt_tokens", 4096, "--output_dir", folder / method, *flags]  # fmt: skip
    given += [word for name, value in SIZES.items() if method in ("grpo", "rloo") or name.endswith("batch_size")
              for word in (f"--{method}.{name}", value)]  # fmt: skip
    given += ["--reward_functions", f"[{folder}/one.py:one]"] if method in ("grpo", "rloo") else []
    config = load(recipe.load("baseline_config").BaselineConfig, list(map(str, given)))
    return recipe.load("baseline_trainers").build(config, open_stage(method, config, {}))


@pytest.mark.parametrize("template", ["qwen3", "llava_next"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_rankings_have_the_prompts_of_sft(tmp_path, method, template) -> None:
    """Under the settings saved with the tokenizer, and the tools and settings of a row, as `encode_prompt` has them."""
    rows = ROWS if template == "qwen3" else ROWS[:2]
    model = base(tmp_path, template, {"enable_thinking": False})
    pairs = [row | {"chosen": "An apple.", "rejected": "No."} for row in rows]
    trainer = built(tmp_path, method, model, pairs).trainer
    wanted = [chat.encode_prompt(trainer.processing_class, row["prompt"], row) for row in rows]
    assert len(set(map(tuple, wanted))) == len(rows)
    found = trainer.train_dataset["prompt_ids"]
    assert sorted(found) == sorted(wanted * {"dpo": 1, "kto": 2}[method])
    if template == "qwen3":
        assert trainer.processing_class.decode(wanted[0]).endswith("assistant\n<think>\n\n</think>\n\n")


def test_kto_takes_rows_of_its_own(tmp_path) -> None:
    """As `rlhf collected export --format kto` writes thumbs, among rankings; DPO, which compares, refuses them."""
    rows = [
        {"prompt": [Q], "completion": [A], "label": True, "annotator": "ann"},
        {"prompt": "Name a fox.", "completion": "a dog", "label": "thumbs_down", "tools": [OTHER]},
        {"prompt": [Q, A, Q], "completion": [CALLED | {"train": False}, RESULT, A], "label": 1},
        {"prompt": "Name a hen.", "chosen": "a hen", "rejected": "no"},
    ]
    model = base(tmp_path, "qwen3", None)
    trainer = built(tmp_path, "kto", model, rows).trainer
    found = {(len(one["prompt"]), one["completion"][-1]["content"]): one for one in trainer.train_dataset}
    assert [found[1, text]["label"] for text in (A["content"], "a dog", "a hen", "no")] == [True, False, True, False]
    untrained = found[5, A["content"]]  # of the completion only the last turn is trained
    assert (untrained["label"], len(untrained["completion"])) == (True, 1)
    turns = [Q, A, Q, CALLED, RESULT]
    assert untrained["prompt_ids"] == chat.encode_prompt(trainer.processing_class, turns)
    assert len(found) == 5
    told = found[1, "a dog"]
    asked = [{"role": "user", "content": "Name a fox."}]
    assert told["prompt_ids"] == chat.encode_prompt(trainer.processing_class, asked, {"tools": [OTHER]})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: prompt, completion, label: a KTO row"):
        built(tmp_path, "dpo", model, rows)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: label: got 3"):
        built(tmp_path, "kto", model, [rows[0] | {"label": 3}])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: prompt, completion: a demonstration, and no comparison"):
        built(tmp_path, "kto", model, [rows[0] | {"label": None}])


@pytest.mark.parametrize(
    ("completion", "seen"),
    [
        ([A, Q, A], "completion: 2 of 3 turns are trained; trl's KTO trains whole completions"),
        ([A, Q, A | {"train": False}], "completion: 1 of 3 turns are trained"),
        ([A | {"train": False}, A], "prompt: the last turn is 'assistant'"),
    ],
)
def test_kto_trains_the_last_turn_alone(completion, seen) -> None:
    rows = read_judged([{"prompt": [Q], "completion": completion, "label": True}])
    with pytest.raises(InputError, match=seen):
        recipe.load("baseline_rows").fitting(rows, tokenizer_for("qwen3"), BaselineConfig(method="kto"))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_rows_of_weight_0_are_left_out(tmp_path, method, caplog) -> None:
    rows = [{"prompt": f"Name fox {n}.", "chosen": "the fox", "rejected": "no"} for n in range(3)]
    rows[1] |= {"weight": 0}
    model = base(tmp_path, "qwen3", None)
    trainer = built(tmp_path, method, model, rows).trainer
    found = {one["prompt"][0]["content"] for one in trainer.train_dataset}
    assert found == {"Name fox 0.", "Name fox 2."}
    assert [one.message for one in caplog.records if "weight" in one.message] == [
        "train_data: 1 of 3 rows have weight 0: left out"
    ]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ([{"weight": 0.5}, {}, {"weight": 2}], ["weight"]),
        ([{"weight": 0.5}] * 3, []),  # as none: only their ratios count
        ([{"margin": 2}, {"margin": 0}, {"margin": None}], ["margin"]),
        ([{"weight": 0.5, "margin": 1}, {}, {}], ["weight, margin"]),
    ],
)
def test_weights_that_trl_lacks_are_told_once(columns, told, caplog) -> None:
    rows = [Ranking([Q], ("a", "b"), (1, 2), given) for given in columns]
    assert recipe.load("baseline_rows").weighing(rows) == rows
    expected = [f"train_data: {names}: trl has none; all rows are trained alike" for names in told]
    assert [one.message for one in caplog.records] == expected


@pytest.mark.parametrize(
    ("weight", "seen"), [(0, "train_data: weight: all 1 rows weigh 0"), (-1, "train_data: row 1: weight: got -1")]
)
def test_weights_that_cannot_be(weight, seen) -> None:
    with pytest.raises(InputError, match=seen):
        recipe.load("baseline_rows").weighing([Ranking([Q], ("a", "b"), (1, 2), {"weight": weight})])


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_prompts_are_those_of_ppo(tmp_path, method) -> None:
    model = base(tmp_path, "qwen3", {"enable_thinking": False})
    rows = [{"prompt": [Q], "tools": None}, {"prompt": [Q, A, Q], "chat_template_kwargs": {"enable_thinking": False}}]
    trainer = built(tmp_path, method, model, rows).trainer
    turns = [row["prompt"] for row in trainer.train_dataset]
    ids = trainer._tokenize_prompts(turns)[0]
    assert ids == [chat.encode_prompt(trainer.processing_class, messages) for messages in turns]
    assert all(trainer.processing_class.decode(one).endswith("assistant\n<think>\n\n</think>\n\n") for one in ids)


@pytest.mark.parametrize(
    ("row", "seen"),
    [(ROWS[1], "chat_template_kwargs: {'enable_thinking': True}"), (ROWS[2], "tools")],
)
def test_prompts_that_trl_would_render_otherwise_are_refused(tmp_path, row, seen) -> None:
    model = base(tmp_path, "qwen3", {"enable_thinking": False})
    with pytest.raises(InputError, match=f"rows.jsonl:2: {seen}: trl's GRPO takes none of a row; take it out"):
        built(tmp_path, "grpo", model, [ROWS[0], row])
    trainer = built(tmp_path, "grpo", model, [ROWS[0], row], "--on_bad_row", "drop").trainer
    assert {json.dumps(one["prompt"]) for one in trainer.train_dataset} == {json.dumps([Q])}


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_responses_are_drawn_from_the_full_softmax(tmp_path, method, monkeypatch) -> None:
    """Whatever the model's own generation_config says, which is saved as it was."""
    own = {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.4, "repetition_penalty": 1.7,
           "no_repeat_ngram_size": 2}  # fmt: skip
    watched = built(tmp_path, method, base(tmp_path, "qwen3", None, **own), ROWS[:1], "--max_new_tokens", 3)
    processors, sample = [], LlamaForCausalLM._sample

    def seen(self, input_ids, logits_processor, *args, **kwargs):
        processors.append(list(logits_processor))
        return sample(self, input_ids, logits_processor, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "_sample", seen)
    trainer = watched.train()
    assert processors
    assert all(found == [] for found in processors)
    assert (trainer.generation_config.top_k, trainer.generation_config.top_p) == (0, 1.0)
    recipe.load("baseline_trainers").save(trainer, tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept.items() >= own.items()
