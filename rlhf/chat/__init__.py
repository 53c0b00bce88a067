"""Conversations as token ids, the same for training, sampling and scoring.

`encoding` holds the functions that everyone calls, offered here too. Below it, `rendering` renders a conversation by a
chat template and encodes it safely, `template` learns what a template does by rendering probes, `spans` finds what the
assistant must write itself, and `answers` parses a sampled response into thinking and answer.
"""

from __future__ import annotations

from rlhf.chat.encoding import (
    CHATML,
    decode_response,
    encode,
    encode_conversation,
    encode_demonstration,
    encode_prompt,
    encode_response,
    encode_text,
    end_of_turn_id,
    is_trained,
    pad_id,
    parse_response,
    prepare_tokenizer,
    set_template_kwargs,
    stop_ids,
    structural_tokens,
    template_arguments,
    template_hash,
    template_kwargs,
)

__all__ = [
    "CHATML",
    "decode_response",
    "encode",
    "encode_conversation",
    "encode_demonstration",
    "encode_prompt",
    "encode_response",
    "encode_text",
    "end_of_turn_id",
    "is_trained",
    "pad_id",
    "parse_response",
    "prepare_tokenizer",
    "set_template_kwargs",
    "stop_ids",
    "structural_tokens",
    "template_arguments",
    "template_hash",
    "template_kwargs",
]
