"""Make models, a tokenizer and prompts for timing: exact amounts of text that means nothing.

    python recipes/benchmarks/synthetic.py job.json      # writes the case's tokenizer, and its model where it has none

A token is a word, so a response read back as text has the tokens it was sampled with, and prompts have the lengths
that were asked for. The chat tokens stand at the end of the vocabulary, where no model puts weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import Job, Result, serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.chat import CHATML, encode_prompt
from rlhf.run.precision import bf16_hardware

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
ROLES = ("user", "assistant", "system", "<unk>")
TEMPLATE_TOKENS = 5  # start, "user", end; start, "assistant"


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, `vocabulary` of them, ChatML's tokens last."""
    words = [*ROLES, *(f"w{i}" for i in range(len(ROLES), vocabulary - len(SPECIALS))), *SPECIALS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<unk>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast, positions: int) -> PreTrainedModel:
    """Return a model with tied embeddings and seeded random weights: a Llama, or the family that the shape names.

    On a GPU it is made there and in bfloat16: drawing billions of numbers takes a CPU a minute."""
    config = AutoConfig.for_model(
        **{"model_type": "llama"} | shape, max_position_embeddings=positions, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    with torch.random.fork_rng(), torch.device("cuda" if on_gpu else "cpu"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)


def make_prompts(tokenizer: Any, lengths: list[int]) -> list[dict[str, str]]:
    """Return prompts whose encoding, chat template included, has these many tokens."""
    generator = torch.Generator().manual_seed(0)
    first, last = len(ROLES), len(tokenizer) - len(SPECIALS)
    rows = []
    for length in lengths:
        ids = torch.randint(first, last, (length - TEMPLATE_TOKENS,), generator=generator).tolist()
        rows.append({"prompt": " ".join(f"w{i}" for i in ids)})
    encoded = [len(encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])) for row in rows]
    assert encoded == lengths, (encoded, lengths)
    return rows


def work(job: Job) -> Result:
    """Write `<folder>/tokenizer`, and `<folder>/model` where the case brings no model of its own; also say what makes
    bfloat16 fast here, None where nothing does."""
    folder, shape, model = Path(job["folder"]), job["case"]["shape"], job["model"]
    vocabulary = shape["vocab_size"] if shape else AutoConfig.from_pretrained(model).vocab_size
    tokenizer = make_tokenizer(vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    if shape:
        model = str(folder / "model")
        positions = job["case"]["prompt_tokens"][1] + job["case"]["new_tokens"] + 8
        make_model(shape, tokenizer, positions).save_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(config, name) for name in (*fields, "vocab_size")}
    sizes["head_dim"] = getattr(config, "head_dim", None) or sizes["hidden_size"] // sizes["num_attention_heads"]
    made = {"model": model, "tokenizer": str(folder / "tokenizer"), "sizes": sizes}
    return made | {"bf16_hardware": bf16_hardware()}


if __name__ == "__main__":
    serve(work)
