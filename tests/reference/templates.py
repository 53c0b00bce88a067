"""trl's chat templates, each with a tokenizer that has its family's tokens, and conversations to render."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0], "chat_templates")  # type: ignore
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja"))
ORIGINALS = [name for name in NAMES if not name.endswith("_training")]
WITH_MASKS = [name for name in NAMES if "{%- generation" in (text := (FOLDER / f"{name}.jinja").read_text("utf-8"))
              or "{% generation" in text]  # fmt: skip

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TAGS += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
NOT_SPECIAL = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>|<｜(?:User|Assistant|tool▁.*)｜>")
TOKENS = re.compile(
    r"<\|[\w\"]+\|?>|<[\w]+\|>|<｜[^｜]+｜>|</?(?:think|tool_call|tool_response|arg_key|arg_value)>|\[gMASK\]|<sop>|"
    r"</s>|<(?:start|end)_of_(?:turn|utterance|image)>|<image>"
)
ENDS = {  # families by their eos
    "<|eot_id|>": ("llama3",),
    "<end_of_turn>": (),
    "<turn|>": (),
    "<|return|>": ("gptoss",),
    "<｜end▁of▁sentence｜>": ("deepseek",),
    "<|END_OF_TURN_TOKEN|>": ("cohere",),
    "</s>": ("llava",),
    "<end_of_utterance>": ("idefics", "smolvlm"),
    "<|eot|>": ("muse",),
    "<|im_end|>": ("qwen", "nemotron", "lfm"),
}
# As Qwen's and Llama 3's tokenizers cut a text: line breaks join, and join to what stands before them.
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["The quick brown fox jumps over the lazy dog.\n\nuser assistant system model\n", "a\n\nb\n\n\nc" * 9] * 20

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "one"},
                "b": {"type": "integer", "description": "x"},
            },
            "required": ["a", "b"],
        },
    },
}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 17, "b": 25}}}
Q, A = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}
Q2, A2 = {"role": "user", "content": "And a red one?"}, {"role": "assistant", "content": "A cherry,\n\nthen."}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT, THOUGHT2 = {"reasoning_content": "They want a fruit."}, {"reasoning_content": "A red one,\nthis time."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "42"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [Q, A],
    "several": [Q, A, Q2, A2],
    "system": [SYSTEM, Q, A, Q2, A2],
    "thinking": [Q, A | THOUGHT],
    "thinking_several": [Q, A | THOUGHT, Q2, A2 | THOUGHT2],
    "own_block": [Q, A | {"content": "<think>\nThey want a fruit.\n</think>\n\nAn apple."}],
    "calling": [Q, CALLED],
    "called": [Q, CALLED, RESULT, A],
    "called_several": [Q, CALLED, RESULT, A, Q2, A2 | THOUGHT2],
}


def tools_of(name: str) -> list[dict[str, Any]] | None:
    return [ADD] if name.startswith("call") else None


@cache
def _backend_state(cut: bool) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
    split = [pre_tokenizers.Split(Regex(CUT), "isolated")] if cut else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def tokenizer_for(name: str, cut: bool = True) -> Any:
    """Make a tokenizer with a template and its tokens; those of contents, and DeepSeek's roles, aren't special."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    text = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    found = list(dict.fromkeys([*TOKENS.findall(text), "<s>", "<|endoftext|>", "<|pad|>"]))
    backend = Tokenizer.from_str(_backend_state(cut))
    eos = next((e for e, families in ENDS.items() if e in found and (not families or name.startswith(families))), None)
    eos = eos or "<|endoftext|>"
    for token in found:
        special = not NOT_SPECIAL.fullmatch(token)
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
