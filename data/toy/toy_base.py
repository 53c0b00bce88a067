"""Train the toy world's base model: a small tokenizer, and a Llama of 0.7 M parameters pretrained on the toy corpus."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rlhf.chat import encode_conversation, prepare_tokenizer
from rlhf.models.waiting import give_way
from rlhf.rows.jsonl import read_rows

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIALS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>")


def read_documents(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of ``pretraining.jsonl``."""
    return [row for _, row in read_rows(path)]


def _texts(document: dict[str, Any]) -> list[str]:
    return [document["text"]] if "text" in document else [turn["content"] for turn in document["messages"]]


def train_tokenizer(documents: list[dict[str, Any]], max_words: int = 600) -> PreTrainedTokenizerFast:
    """Train a tokenizer with one token per frequent word and one per byte, so that it can encode any text.

    Words are those of the byte-level pre-tokenizer (the space before a word belongs to it). By the scores of a unigram
    model, a text is cut into as few words as possible, with bytes only where no word fits.

    Args:
        documents: rows of ``pretraining.jsonl``.
        max_words: largest number of words; the most frequent ones are taken.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    lines = Counter(text for document in documents for text in _texts(document))
    counts: Counter[str] = Counter(("user", "assistant", "system", splitter.pre_tokenize_str("\n")[0][0]))
    for text, times in lines.items():
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] += times
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    frequent = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = [(char, -20.0) for char in alphabet] + [(word, -1.0) for word in frequent[:max_words]]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=None))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PAD)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[2:])})
    prepare_tokenizer(tokenizer)
    return tokenizer


def encode_document(tokenizer: PreTrainedTokenizerFast, document: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Encode a document; return its ids and the mask of those with loss: all of a text, the answers of a conversation.

    Conversations are in the chat template. Requests have no loss, since they are mostly random: with it, so small a
    model learnt too little of the rest in a minute.
    """
    if "messages" in document:
        return encode_conversation(tokenizer, document["messages"])
    ids = tokenizer(document["text"], add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    return ids, [True] * len(ids)


def _batches(
    rows: list[tuple[list[int], list[bool]]], batch_size: int, pad: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch of (ids, labels), right-padded: rows of similar length share a batch, the order is random."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    pools = [order[start : start + 50 * batch_size] for start in range(0, len(order), 50 * batch_size)]
    batches = []
    for pool in pools:
        pool.sort(key=lambda index: len(rows[index][0]))
        batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
    for which in torch.randperm(len(batches), generator=generator).tolist():
        chosen = [rows[index] for index in batches[which]]
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen])
        learnt = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in chosen])
        yield ids, torch.where(learnt, ids, -100)


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Make a small Llama with tied embeddings, untrained."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,  # at the usual 0.02, a model this small takes twice as long to learn copying
    )
    return LlamaForCausalLM(config)


def _save_quietly(model: LlamaForCausalLM, output: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(output)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def pretrain(
    data_folder: str | Path,
    output_dir: str | Path,
    seed: int = 0,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    epochs: int = 1,
    log: Callable[[dict[str, float]], None] | None = None,
    logging_steps: int = 10,
) -> dict[str, Any]:
    """Train the tokenizer and pretrain the base model on ``<data_folder>/pretraining.jsonl``, in float32 on the CPU.

    One document per row, since with packing the model doesn't learn to copy from prompts. AdamW, a short warm-up, then
    linear decay to 0.

    Args:
        data_folder: the folder that toy_world.make wrote.
        output_dir: folder for the model, the tokenizer and ``metrics.jsonl`` (``step``, ``loss`` in nats per token).
        seed: seed of the initial weights and of the order of the documents.
        hidden_size, layers, heads: the model's shape.
        learning_rate: its peak.
        batch_size: documents per step.
        epochs: passes over the documents.
        log: called with every logged line and ``steps``, the number of all steps.
        logging_steps: steps per logged line, whose loss is their mean.

    Returns:
        ``parameters``, ``vocabulary``, ``steps``, ``tokens``, ``loss`` (the last one logged) and ``seconds``.
    """
    give_way(torch.device("cpu"))  # to other programs: beside a busy one it would take ten times as long
    started, output = time.monotonic(), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    documents = read_documents(Path(data_folder) / "pretraining.jsonl")
    tokenizer = train_tokenizer(documents)
    rows = [encode_document(tokenizer, document) for document in documents]
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn from torch's global generator
        torch.manual_seed(seed)
        model = build_model(tokenizer, hidden_size, layers, heads)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * sum(1 for _ in _batches(rows, batch_size, 0, torch.Generator()))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    step, losses, line = 0, list[float](), dict[str, float]()
    with (output / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        for _ in range(epochs):
            for ids, labels in _batches(rows, batch_size, tokenizer.pad_token_id, generator):
                loss = model(input_ids=ids, labels=labels).loss  # padding on the right: no token sees it
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                losses.append(loss.item())
                if step % logging_steps == 0 or step == steps:
                    line = {"step": step, "loss": sum(losses) / len(losses)}
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    losses.clear()
                    if log is not None:
                        log({**line, "steps": steps})
    _save_quietly(model, output)
    tokenizer.save_pretrained(output)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": steps,
        "tokens": epochs * sum(len(ids) for ids, _ in rows),
        "loss": line["loss"],
        "seconds": time.monotonic() - started,
    }
