"""Encoded demonstrations: what is trained, what is left out, and what is refused, by name."""

from __future__ import annotations

import logging

import pytest
from reference.templates import CONVERSATIONS, Q, tokenizer_for

from rlhf import chat
from rlhf.errors import InputError
from rlhf.padding import IGNORED
from rlhf.rows.records import Demonstration, read_demonstrations
from rlhf.sft.data import encode_demonstrations

ANSWER = {"role": "assistant", "content": "An apple."}


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_ultra", "deepseek_r1_distill"])
def test_a_plain_answer_under_a_thinking_template_is_refused_with_the_remedies(name):
    tokenizer = tokenizer_for(name)
    with pytest.raises(InputError) as caught:
        encode_demonstrations(tokenizer, read_demonstrations([{"messages": [Q, ANSWER]}]), 999, "train_dataset")
    text = str(caught.value)
    assert "messages: the generation prompt ends with " in text
    assert "\n" not in text
    assert ("reasoning_content" in text) == ("deepseek" not in name)
    assert ("chat_template_kwargs to {'enable_thinking': False}" in text) == ("deepseek" not in name)


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_ultra", "glm4moe"])
def test_both_remedies_train_what_the_template_writes(name):
    tokenizer = tokenizer_for(name)
    thought = read_demonstrations([{"messages": [Q, ANSWER | {"thinking": "They want a fruit."}]}])
    row = encode_demonstrations(tokenizer, thought, 9999, "train_dataset")[0]
    assert "They want a fruit." in trained(tokenizer, row)
    prompt = chat.encode_prompt(tokenizer, [Q])
    assert row["input_ids"][: len(prompt)] == prompt
    plain = read_demonstrations([{"messages": [Q, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}])
    row = encode_demonstrations(tokenizer, plain, 9999, "train_dataset")[0]
    assert trained(tokenizer, row).strip() == "An apple." + tokenizer.decode([row["input_ids"][-1]])
    chat.set_template_kwargs(tokenizer, {"enable_thinking": False})
    same = encode_demonstrations(tokenizer, [Demonstration([Q, ANSWER])], 9999, "train_dataset")[0]
    assert same == row


def test_settings_of_the_template_are_saved_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_for("qwen3_6")
    before = chat.template_hash(tokenizer)
    chat.set_template_kwargs(tokenizer, {"enable_thinking": False})
    assert chat.template_hash(tokenizer) != before
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert chat.template_kwargs(loaded) == {"enable_thinking": False}
    assert chat.encode_prompt(loaded, [Q]) == chat.encode_prompt(tokenizer, [Q])
    assert tokenizer.decode(chat.encode_prompt(loaded, [Q])).endswith("</think>\n\n")
    with pytest.raises(InputError, match="chat_template_kwargs: 'chat_template' is set by the trainer"):
        chat.encode_prompt(tokenizer, [Q], {"chat_template_kwargs": {"chat_template": "x"}})


def test_turns_that_are_not_trained(caplog):
    tokenizer = tokenizer_for("qwen2_5")
    turns = CONVERSATIONS["several"]
    marked = [turns[0], turns[1] | {"weight": 0}, *turns[2:]]
    none = [turns[0], turns[1] | {"train": False}]
    with caplog.at_level(logging.WARNING):
        rows = encode_demonstrations(
            tokenizer, read_demonstrations([{"messages": marked}, {"messages": none}]), 999, "train_dataset"
        )
    assert [trained(tokenizer, row) for row in rows] == ["A cherry,\n\nthen.<|im_end|>"]
    assert "left out 1 of 2 demonstrations without a trained turn (train, weight): 2" in caplog.text
    with pytest.raises(InputError, match="no turn is trained"):
        encode_demonstrations(tokenizer, read_demonstrations([{"messages": none}]), 999, "train_dataset")


def test_what_a_template_leaves_out_is_named_with_the_row():
    rows = [Demonstration([Q, ANSWER]), Demonstration([Q, ANSWER | {"reasoning_content": "Hm."}])]
    with pytest.raises(InputError, match=r"messages\[1\].reasoning_content: the chat"):
        encode_demonstrations(tokenizer_for("llama3"), rows, 999, "eval_dataset")
    block = [Demonstration([Q, ANSWER | {"content": "<think>Hm.</think>An apple."}])]
    with pytest.raises(InputError, match=r"messages\[1\].content: the chat template leaves out its thinking \('Hm.'\)"):
        encode_demonstrations(tokenizer_for("deepseek_r1_distill"), block, 999, "train_dataset")
    twice = [Demonstration([Q, {**block[0].messages[1], "reasoning_content": "Hm."}])]
    with pytest.raises(InputError, match=r"thinking in reasoning_content and in the content, too"):
        encode_demonstrations(tokenizer_for("qwen3_6"), twice, 999, "train_dataset")
