"""Preflight checks of tokenizer, chat template and stop tokens. Nothing here runs a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf import chat
from rlhf.errors import InputError, short
from rlhf.padding import IGNORED
from rlhf.preflight.measure import Finding
from rlhf.rows.messages import Messages
from rlhf.rows.records import Demonstration


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Finding:
    """Check that every id of the tokenizer, its padding and its stop tokens have one of the `rows` embeddings.

    Padding may be a stop token, since masks come from lengths.
    """
    ids = {"largest token": max(tokenizer.get_vocab().values()), "pad": chat.pad_id(tokenizer)}
    ids |= {f"stop {tokenizer.convert_ids_to_tokens(i)}": i for i in chat.stop_ids(tokenizer)}
    outside = [f"{name} id {i}" for name, i in ids.items() if not 0 <= i < rows]
    return Finding(
        "vocabulary",
        f"{', '.join(outside)} outside the model's {rows} embeddings"
        if outside
        else f"ids to {ids['largest token']} of {rows} embeddings, pad {ids['pad']}",
        not outside,
        "the tokenizer is not this model's, or got tokens that the model never learned",
        "use the tokenizer saved with the model, or fine-tune with SFTTrainer, which adds rows for new tokens",
    )


def check_template(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> Finding:
    """Check that a prompt and its response are the beginning and the end of the conversation, and that most responses
    decode to their text.

    (Not all must: a vocabulary without bytes loses characters that it never saw.)
    """
    changed, shown = 0, ""
    for messages in conversations[:8]:
        text, own = messages[-1]["content"], chat.encode(tokenizer, messages)
        response = own.ids[own.answer_from :]
        apart = chat.encode_prompt(tokenizer, messages[:-1]) + response
        whole = chat.encode_conversation(tokenizer, messages)[0]
        if own.sampled and apart != whole:
            return Finding(
                "template",
                f"prompt + response gives {len(apart)} tokens, the conversation {len(whole)} others "
                f"({short(text, 40)!r})",
                False,
                "the chat template renders a turn differently when it is the last",
                "use a template that renders each turn by itself",
            )
        back = chat.decode_response(tokenizer, response)
        if _answer(text) not in back:
            changed, shown = changed + 1, f"{short(text, 40)!r} comes back as {short(back, 40)!r}"
    count = min(8, len(conversations))
    return Finding(
        "template",
        f"{count - changed} of {count} responses come back from their tokens{': ' if shown else ''}{shown}",
        2 * changed <= count,
        "encoding or decoding changes text, so rewards would judge other words than the policy's",
        "check the tokenizer's normaliser and decoder, and what the template writes around a response",
    )


def _answer(content: str) -> str:
    """Return a content without white space around it and without thinking of its own, which templates write anew."""
    return content.rpartition("</think>")[2].strip()


def check_injection(tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Check that a control token's name in a message stays text: it can't end a turn or forge a role."""
    tokens = chat.structural_tokens(tokenizer).items()
    wanted = {i: name for name, i in tokens if i != tokenizer.unk_token_id}
    wanted |= {i: str(tokenizer.convert_ids_to_tokens(i)) for i in chat.stop_ids(tokenizer)}
    prompt, response = _encoded(tokenizer, "a"), chat.encode_response(tokenizer, "a")
    for i, name in list(wanted.items())[:32]:
        try:
            forged = _encoded(tokenizer, f"a {name} a"), chat.encode_response(tokenizer, f"a {name} a")
        except InputError:  # refusing the text is as safe
            continue
        if forged[0].count(i) > prompt.count(i) or forged[1].count(i) > response.count(i):
            return Finding(
                "injection",
                f"the text {name!r} inside a message becomes control token {i}",
                False,
                "whoever writes a prompt can end its turn and forge the next one",
                "use a tokenizer whose special tokens rlhf.chat can switch off (any fast tokenizer)",
            )
    return Finding("injection", f"{min(32, len(wanted))} control tokens stay text inside a message", True)


def _encoded(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    return chat.encode_prompt(tokenizer, [{"role": "user", "content": content}])


def check_generation_stop(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> Finding:
    """Check that the saved model's own `generate` stops where our training ends a turn."""
    wanted = chat.end_of_turn_id(tokenizer)
    stops = getattr(generation_config, "eos_token_id", None)
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return Finding(
        "stop token",
        f"end of turn {wanted} {'is' if wanted in listed else 'is not'} among generation_config's stops {listed}",
        wanted in listed,
        "a model trained to end its turn would not stop when generating",
        f"set model.generation_config.eos_token_id = {[*listed, wanted]}",
    )


def check_trained(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Sequence[int]]],
    demonstrations: Sequence[Demonstration],
    max_length: int,
) -> Finding:
    """Check that the tokens with loss, decoded, hold the demonstration's answers, and end with an end of turn."""
    stops, checked = chat.stop_ids(tokenizer), 0
    for number, (demonstration, row) in enumerate(
        zip(_fitting(tokenizer, demonstrations, max_length), islice(rows, 8), strict=False), 1
    ):
        spans = trained_spans(row["input_ids"], row["labels"])
        wanted = [
            _answer(message["content"])
            for index, message in enumerate(demonstration.messages)
            if message["role"] == "assistant" and index >= demonstration.trained_from and chat.is_trained(message)
        ]
        got = [chat.decode_response(tokenizer, span).strip() for span in spans]
        # encoded and decoded, since the tokenizer may lose characters
        right = [_answer(chat.decode_response(tokenizer, chat.encode_response(tokenizer, text))) for text in wanted]
        ends = bool(spans) and spans[-1][-1] in stops
        same = len(got) == len(right) and all(text in span for text, span in zip(right, got, strict=True))
        if not same or not ends:
            seen = f"row {number} trains {short(' / '.join(got))!r}{'' if ends else ' without its end of turn'}"
            return Finding(
                "trained tokens",
                f"{seen}, its answers are {short(' / '.join(right))!r}",
                False,
                "the loss mask covers other tokens than the assistant's and their end of turn",
                "build labels with rlhf.chat.encode_conversation, and don't change the encoded dataset",
            )
        checked += 1
    return Finding("trained tokens", f"{checked} rows train their answers and end of turn, nothing else", checked > 0)


def _fitting(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], max_length: int
) -> Iterator[Demonstration]:
    """Yield the demonstrations that became rows of the encoded dataset."""
    for d in demonstrations:
        ids, mask = chat.encode_conversation(tokenizer, d.messages, d.trained_from, d.columns)
        if len(ids) <= max_length and any(mask):
            yield d


def trained_spans(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """Return the runs of labels with loss. (Labels, not ids, so that a label unlike its token is noticed.)"""
    spans: list[list[int]] = []
    for index, label in enumerate(labels):
        if label == IGNORED:
            continue
        if index and labels[index - 1] != IGNORED:
            spans[-1].append(label)
        else:
            spans.append([label])
    return spans
