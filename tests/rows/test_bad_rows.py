"""Rows that a chat template refuses: named by file and line, or dropped and counted, in every trainer; and PPO's
prompts in both of its datasets."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from reference import tiny_chain

from reward_models import RewardConfig, RewardTrainer
from rlhf.errors import InputError
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sft.trainer import SFTConfig, SFTTrainer

STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def strict(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """A tiny model whose template wants user and assistant in turn, as Gemma's and Mistral's do."""
    tiny_tokenizer.chat_template = STRICT
    return tiny_chain.save_base(tmp_path / "strict", tiny_model, tiny_tokenizer)


def rows(file: Path, *fields: str) -> Path:
    """Write eight rows; the third has two user turns in a row."""
    with file.open("w") as out:
        for n in range(8):
            asked = [{"role": "user", "content": f"Count to {n}."}]
            if n == 2:
                asked.append({"role": "user", "content": "Quick!"})
            own = {"chosen": f"one {n}", "rejected": "no", "completion": f"one {n}"}
            out.write(json.dumps({"prompt": asked, **{name: own[name] for name in fields}}) + "\n")
    return file


def trainer_of(stage: str, model: Path, file: Path, folder: Path, rule: str):
    common = {"output_dir": str(folder), "bf16": False, "on_bad_row": rule}
    if stage == "sft":
        return SFTTrainer(str(model), SFTConfig(**common, batch_size=4, microbatch_size=4), str(file))
    if stage == "reward_model":
        config = RewardConfig(**common, prompts_per_batch=4)
        return RewardTrainer(str(model), args=config, train_dataset=str(file))
    config = PPOConfig(**common, rollout_size=4, minibatch_size=4, max_new_tokens=4, updates=1)
    return PPOTrainer(str(model), lambda completions: [0.5] * len(completions), config, str(file))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_a_row_that_the_template_refuses(tmp_path, strict, stage, caplog):
    fields = {"sft": ["completion"], "reward_model": ["chosen", "rejected"], "ppo": []}[stage]
    file = rows(tmp_path / "rows.jsonl", *fields)
    with pytest.raises(InputError, match=r"rows\.jsonl:3: .*roles must alternate") as caught:
        trainer_of(stage, strict, file, tmp_path / "run", "refuse")
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        trainer = trainer_of(stage, strict, file, tmp_path / "run", "drop")
    assert "on_bad_row=drop: left out: 1 of 8 rows can't be used, the first" in caplog.text
    assert f"{file}:3: " in caplog.text
    if stage == "ppo":
        assert len(trainer.prompts) == len(trainer.prompt_ids) == 7
    else:
        assert len(trainer.train_dataset) == 7
    trainer.train()  # with its preflight


def test_ppo_warns_of_prompts_in_both_datasets(tmp_path, strict, caplog):
    train = [{"prompt": f"Count to {n}.", "answer": n} for n in range(4)]

    def make(held_out, function=lambda completions: [0.5] * len(completions)):
        config = PPOConfig(output_dir=str(tmp_path / "run"), bf16=False, rollout_size=4, minibatch_size=4)
        return PPOTrainer(str(strict), function, config, train, held_out)

    with caplog.at_level(logging.WARNING, "rlhf"):
        make([{"prompt": "Count to 3. ", "answer": 3}, {"prompt": "Who?", "answer": 1}])
    (line,) = [record.message for record in caplog.records if "in both" in record.message]
    assert line.startswith("train_dataset, eval_dataset: prompt: 1 in both, the first is 'Count to 3. '")

    def graded(completions, answer):
        return [float(a) for a in answer]

    with pytest.raises(InputError, match="graded: it needs 'answer', and eval_dataset has no such column"):
        make([{"prompt": "Who?"}], graded)
    assert len(make([{"prompt": "Who?", "answer": 1}], graded).eval_prompts) == 1
