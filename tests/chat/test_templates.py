"""rlhf.chat on all of trl's chat templates, against transformers' rendering and trl's marks of what is generated."""

from __future__ import annotations

from datetime import date

import pytest
from reference.templates import CONVERSATIONS, NAMES, ORIGINALS, THOUGHT, WITH_MASKS, A, Q, tokenizer_for, tools_of

from rlhf import chat
from rlhf.errors import InputError

# What a template leaves out: the conversation is refused by name.
THINKING = ("thinking", "thinking_several")
CALLS = ("calling", "called", "called_several")


def rendered(tokenizer, messages, tools=None, **options):
    """Render with transformers alone, contents as parts where the template reads those."""
    if any(
        name in tokenizer.chat_template for name in ("message['content'][0]['type']", "message['content'][0]['text']")
    ):
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)
    except TypeError:  # DeepSeek's wants text
        messages = [
            m | {"tool_calls": [texted(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
        ]
        return tokenizer.apply_chat_template(messages, tools=tools, **options)


def texted(call):
    return call | {"function": call["function"] | {"arguments": '{"a": 17, "b": 25}'}}


def ids_of(tokenizer, messages, tools=None, **options):
    return rendered(tokenizer, messages, tools, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_finished_conversation_is_the_templates_own(name, case):
    tokenizer, messages, tools = tokenizer_for(name), CONVERSATIONS[case], tools_of(case)
    try:
        ids, _ = chat.encode_conversation(tokenizer, messages, row={"tools": tools})
    except InputError as error:
        return refused(tokenizer, messages, tools, str(error))
    wanted = ids_of(tokenizer, messages, tools)
    if ids[: len(wanted)] == wanted and len(ids) == len(wanted) + 1:  # the next turn's marker ends this one, or eos
        assert ids[-1] in chat.stop_ids(tokenizer)
        return None
    assert ids == wanted[: len(ids)], tokenizer.decode(ids)
    rest = tokenizer.decode(wanted[len(ids) :]).replace(tokenizer.eos_token, "")
    assert not rest.strip(), rest
    assert ids[-1] in chat.stop_ids(tokenizer), tokenizer.decode(ids)
    return None


def refused(tokenizer, messages, tools, error):
    """A refusal is right where the template refuses, or its text lacks what the error names."""
    try:
        text = rendered(tokenizer, messages, tools, tokenize=False)
    except Exception:
        assert "refuses the roles" in error, error
        return
    if "reasoning_content" in error or "its thinking" in error:
        assert not all(m.get("reasoning_content", "fruit.\n</think>") in text for m in messages), error
    elif "tool_calls" in error:
        assert "17" not in text
    elif "tools: " in error:
        assert "Adds two numbers." not in text
    else:
        assert "drops turn" in error, error
        assert "42" not in text, error


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_prompt_is_the_templates_own(name, case):
    tokenizer, messages, tools = tokenizer_for(name), CONVERSATIONS[case][:-1], tools_of(case)
    try:
        ids = chat.encode_prompt(tokenizer, messages, {"tools": tools})
    except InputError as error:
        return refused(tokenizer, messages, tools, str(error))
    assert ids == ids_of(tokenizer, messages, tools, add_generation_prompt=True)
    return None


def marked(tokenizer, messages, tools):
    """Return ids and trl's marks, without the generation prompts inside them and white space after an end of turn."""
    out = rendered(tokenizer, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], list(out["assistant_masks"])
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = ids_of(tokenizer, messages[:n], tools, add_generation_prompt=True)
            same = next((k for k, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
            start = same
            while start and mask[start - 1]:
                start -= 1
            if not any(mask[start:same]) or same == 0:
                continue
            mask[start:same] = [0] * (same - start)
    stops = set(chat.stop_ids(tokenizer))
    for k in range(1, len(ids)):
        if mask[k] and not tokenizer.decode([ids[k]]).strip() and ids[k - 1] in stops:
            mask[k] = 0
    return ids, [bool(m) for m in mask]


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", WITH_MASKS)
def test_what_is_trained_is_what_trl_marks(name, case):
    tokenizer, messages, tools = tokenizer_for(name), CONVERSATIONS[case], tools_of(case)
    try:
        ids, mask = chat.encode_conversation(tokenizer, messages, row={"tools": tools})
    except InputError:
        pytest.skip("refused, as the test above checks")
    _, wanted = marked(tokenizer, messages, tools)
    wanted = wanted[: len(ids)] + [True] * (len(ids) - len(wanted))
    if name.startswith("diffusion_gemma"):
        # trl marks neither the token that ends a call nor the header that no generation prompt writes after its result.
        more = {tokenizer.decode([i]) for i, ours, theirs in zip(ids, mask, wanted, strict=True) if ours and not theirs}
        assert more <= {"<|tool_response>", "<|turn>", "m", "o", "d", "e", "l", "\n", "mo", "del", "model"}
        mask = [ours and theirs for ours, theirs in zip(mask, wanted, strict=True)]
    assert mask == wanted, "\n".join(
        f"{tokenizer.decode([i])!r:25} {ours} {theirs}" for i, ours, theirs in zip(ids, mask, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("nemotron_3_ultra", "</think>An apple.<|im_end|>"),
        ("qwen3_6", "An apple.<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|>An apple.<|end|>"),
        ("glm4moe", "\n<think></think>\nAn apple.<|user|>"),
        ("gemma4_v5", "An apple.<turn|>"),
    ],
)
def test_turns_before_which_later_turns_change_the_text(name, trained):
    """The thinking before a call stands there only until the user's next question."""
    tokenizer = tokenizer_for(name)
    called, result, answer, question, last = CONVERSATIONS["called_several"][1:]
    messages = [Q, called | THOUGHT, result, answer, question, last]
    row = {"tools": tools_of("called")}
    ids, _ = chat.encode_conversation(tokenizer, messages, row=row)
    assert ids == ids_of(tokenizer, messages, row["tools"])[: len(ids)] or name == "glm4moe"
    messages = [*messages[:5], messages[5] | {"train": False}]
    ids, mask = chat.encode_conversation(tokenizer, messages, 3, row)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == trained


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8"])
@pytest.mark.parametrize("content", ["An apple.", " An apple.", "\nAn apple.", "\n\n  An apple."])
def test_white_space_before_an_answer_excuses_no_other_start_than_the_prompts(name, content):
    tokenizer, messages = tokenizer_for(name), [Q, A | {"content": content}]
    with pytest.raises(InputError, match="the finished turn goes on in another way"):
        chat.encode_demonstration(tokenizer, messages)
    row = {"chat_template_kwargs": {"enable_thinking": False}}
    ids, mask = chat.encode_demonstration(tokenizer, messages, row=row)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "An apple.<|im_end|>"


@pytest.mark.parametrize("content", [" An apple.", "\nAn apple.", "\n <|im_end|>"])
def test_white_space_before_an_answer_may_join_the_prompts_line_break(content):
    tokenizer = tokenizer_for("qwen3")
    tokenizer.chat_template = chat.CHATML
    ids, mask = chat.encode_demonstration(tokenizer, [Q, A | {"content": content}])
    own = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert own.removeprefix("\n").endswith(f"{content.strip()}<|im_end|>")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_calling_turn_says_is_trained_or_refused(name):
    """Gemma 4 writes it behind the tool's response, where no turn of the assistant's is; GPT-OSS leaves it out."""
    tokenizer, row = tokenizer_for(name), {"tools": tools_of("called")}
    called, result, answer = CONVERSATIONS["called"][1:]
    said = [Q, called | {"content": "Let me see."}, result, answer]
    if name.removesuffix("_training") in ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"):
        with pytest.raises(InputError, match=r"messages\[1\]\.content: the chat template writes it outside"):
            chat.encode_conversation(tokenizer, said, row=row)
        return
    try:
        ids, mask = chat.encode_conversation(tokenizer, said, row=row)
    except InputError:
        pytest.skip("the template refuses calls or drops them, as the tests above check")
    own = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert ("Let me see." in own) == ("Let me see." in tokenizer.decode(ids))


def test_what_gemma_says_with_a_call_may_stand_before_a_trained_turn():
    tokenizer, row = tokenizer_for("gemma4"), {"tools": tools_of("called")}
    called, result, answer = CONVERSATIONS["called"][1:]
    said = [Q, called | {"content": "Let me see.", "train": False}, result, answer]
    ids, mask = chat.encode_demonstration(tokenizer, said, row=row)
    assert "<tool_response|>Let me see.<turn|>" in tokenizer.decode(ids)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "An apple.<turn|>"


def test_the_date_is_todays():
    tokenizer = tokenizer_for("gptoss")
    assert date.today().isoformat() in tokenizer.decode(chat.encode_prompt(tokenizer, CONVERSATIONS["single"][:1]))
