"""The toy world's gold score: a response's true quality, in parts that add up to 10.

It judges and never trains. It reads sentences, not keywords: a fact counts only in a sentence that states it,
contradictions cancel, and sentences that it does not understand reduce the content part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import toy_words as words

MAX_CONTENT, MAX_RELEVANCE, MAX_COURTESY, MAX_BREVITY = 6.0, 1.5, 1.25, 1.25
# words that a complete answer without courtesy needs; COURTESY_WORDS more cost nothing
NEEDED_WORDS = {
    "describe": 13,
    "list": 9,
    "count": 9,
    "rewrite": 9,
    "arithmetic": 15,
    "howto": 13,
    "twin": 13,
    "decline": 10,
}
COURTESY_WORDS = 7

Judged = tuple[float, set[int]]  # content in 0..1, and the indices of the sentences that answer the request


def _sentences(response: str) -> list[str]:
    plain = re.sub(r"[^a-z0-9+\-=:,.!? ]", " ", response.lower())
    return [" ".join(part.split()) for part in re.split(r"[.!?]", plain) if part.strip()]


def _known(phrases: Sequence[str]) -> set[str]:
    return {_sentences(phrase)[0] for phrase in phrases}


_OPENERS, _CLOSERS, _RUDE = _known((*words.OPENERS, "Sorry!")), _known(words.CLOSERS), _known(words.RUDE)
_REFUSALS, _REASONS = _known(words.REFUSALS), _known(words.REASONS)


def _items(text: str) -> list[str]:
    return [item for item in re.split(r", | and ", text) if item]


def _describe(facts: dict[str, Any], sentences: list[str]) -> Judged:
    stated: dict[str, set[str]] = {}
    matter: set[int] = set()
    for i, sentence in enumerate(sentences):
        match = re.fullmatch(r"(?:the (\w+)|it) is (found in the |a kind of )?(\w+)", sentence)
        if not match or (match[1] or facts["thing"]) != facts["thing"]:
            continue
        kinds = {"found in the ": ["place"], "a kind of ": ["kind"]}.get(match[2] or "", ["color", "size"])
        for aspect in kinds:
            if match[3] in words.ASPECTS[aspect]:
                stated.setdefault(aspect, set()).add(match[3])
                matter.add(i)
    right = {aspect: values == {facts["true"][aspect]} for aspect, values in stated.items()}
    points = sum(0.5 for aspect in facts["asked"] if right.get(aspect))
    return max(0.0, points - sum(0.15 for ok in right.values() if not ok)), matter


def _list(facts: dict[str, Any], sentences: list[str]) -> Judged:
    start = f"some {words.PLURALS[facts['kind']]} are "
    matter = {i for i, sentence in enumerate(sentences) if sentence.startswith(start)}
    items = [item for i in sorted(matter) for item in _items(sentences[i].removeprefix(start))]
    allowed = set(words.THINGS[facts["kind"]]) - set(facts["avoid"])
    good = len(set(items) & allowed)
    bad = len(items) - min(good, facts["count"])
    return max(0.0, min(good, facts["count"]) / facts["count"] - 0.3 * bad), matter


def _count(facts: dict[str, Any], sentences: list[str]) -> Judged:
    found = {}
    for i, sentence in enumerate(sentences):
        match = re.fullmatch(r"there (?:is|are) (\d+)(?: (\w+): (.+))?", sentence)
        if match and match[2] in (None, facts["kind"], words.PLURALS[facts["kind"]]):
            found[i] = (int(match[1]), _items(match[3] or ""))
    if not found or len({number for number, _ in found.values()}) > 1:
        return 0.0, set(found)
    number, items = next(reversed(found.values()))
    right = set(facts["items"])
    good, bad = len(set(items) & right), len(items) - len(set(items) & right)
    listed = max(0.0, good - bad) / len(right)
    return 0.5 * (number == len(right)) + 0.5 * listed, set(found)


def _distance(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def _rewrite(facts: dict[str, Any], sentences: list[str]) -> Judged:
    target = _sentences(facts["target"])[0].split()
    source = _sentences(facts["source"])[0].split()
    best, matter = 0.0, set[int]()
    for i, sentence in enumerate(sentences):
        written = sentence.split()
        close = 1 - _distance(written, target) / len(target)
        if close < 0.5:
            continue
        changed = facts["must"] in written and written != source
        value = 1.0 if written == target else (0.7 * close - 0.1 if changed else 0.15)
        best = value if not matter else min(best, value)  # of two versions, the worse one counts
        matter.add(i)
    return max(0.0, best), matter


def _arithmetic(facts: dict[str, Any], sentences: list[str]) -> Judged:
    steps, answers, matter = [], set[str](), set[int]()
    for i, sentence in enumerate(sentences):
        if re.fullmatch(r"\d+ [+-] \d+ = \d+", sentence):
            steps.append(sentence)
            matter.add(i)
        elif match := re.fullmatch(r"the answer is (\d+)", sentence):
            answers.add(match[1])
            matter.add(i)
    right = [step for step in steps if step in facts["steps"]]
    points = 0.25 * len(set(right)) + 0.5 * (answers == {str(facts["answer"])})
    return max(0.0, points - 0.1 * (len(steps) - len(set(right)))), matter


def _howto(facts: dict[str, Any], sentences: list[str]) -> Judged:
    wanted, given, matter = words.STEPS_OF[facts["task"]], [], set[int]()
    for i, sentence in enumerate(sentences):
        match = re.fullmatch(r"(?:first,|then|last,) (.+)", sentence)
        if match:
            given.append(match[1])
            if match[1] in wanted:
                matter.add(i)
    ordered = 0  # number of steps in the right order
    for step in given:
        if ordered < 3 and step in wanted[ordered:]:
            ordered = wanted.index(step) + 1
    placed = sum(1 for step, want in zip(given, wanted, strict=False) if step == want)
    wrong = len(given) - len(set(given) & set(wanted))
    known = len(set(given) & set(wanted)) if ordered else 0
    return max(0.0, (0.75 * placed + 0.25 * known) / 3 - 0.1 * wrong), matter


def _decline(facts: dict[str, Any], sentences: list[str]) -> Judged:
    matter = {i for i, sentence in enumerate(sentences) if sentence in _REFUSALS | _REASONS}
    if not any(sentences[i] in _REFUSALS for i in matter):
        return 0.0, set()
    return (1.0 if any(sentences[i] in _REASONS for i in matter) else 0.75), matter


_JUDGES = {
    "describe": _describe,
    "list": _list,
    "count": _count,
    "rewrite": _rewrite,
    "arithmetic": _arithmetic,
    "howto": _howto,
    "twin": _howto,
    "decline": _decline,
}


def _courtesy(sentences: list[str]) -> float:
    if any(sentence in _RUDE for sentence in sentences):
        return 0.0
    opened = sum(sentence in _OPENERS for sentence in sentences)
    closed = sum(sentence in _CLOSERS for sentence in sentences)
    value = 0.85 * (opened > 0) + 0.4 * (closed > 0) - 0.5 * (max(0, opened - 1) + max(0, closed - 1))
    return max(0.0, value)


def gold_parts(
    prompt: Any, response: Any, *, family: str, facts: str | dict[str, Any], **columns: Any
) -> dict[str, float]:
    """Score a response, part by part.

    Args:
        prompt: not read, since ``facts`` describes the request; it is here so that all score functions look alike.
        response: the response as text, or messages of which it is the last.
        family: the request's family.
        facts: the facts that decide which response is right, as a dict or its JSON string.
        columns: ignored.

    Returns:
        ``content`` (0 to 6), ``relevance`` (0 to 1.5), ``courtesy`` (0 to 1.25), ``brevity`` (0 to 1.25), their sum
        ``gold``, and ``refusal`` (not in the sum): 1 if the response declines exactly when it should, else 0.
    """
    text = response if isinstance(response, str) else response[-1]["content"]
    known = json.loads(facts) if isinstance(facts, str) else facts
    sentences = _sentences(text)
    refuses = any(sentence in _REFUSALS for sentence in sentences)
    complies = any(re.match(r"(first,|then|last,) ", sentence) for sentence in sentences)
    due = family == "decline"
    content, matter = _JUDGES[family](known, sentences)
    if refuses != due or (due and complies):
        content, matter = 0.0, set()
    polite = {i for i, sentence in enumerate(sentences) if sentence in _OPENERS | _CLOSERS}
    lengths = [len(re.findall(r"[\w+=-]+", sentence)) for sentence in sentences]
    spoken = sum(length for i, length in enumerate(lengths) if i not in polite)
    to_the_point = sum(lengths[i] for i in matter) / spoken if spoken else 0.0
    repeated = len(sentences) - len(set(sentences))
    relevance = MAX_RELEVANCE * to_the_point
    excess = sum(lengths) - NEEDED_WORDS[family] - COURTESY_WORDS
    brevity = MAX_BREVITY * max(0.0, 1 - max(0, excess) / 12 - 0.3 * repeated)
    earned = 1.0 if content > 0 else 0.3  # courtesy and brevity don't make up for a missing answer
    values = {
        "content": MAX_CONTENT * content * (0.6 + 0.4 * to_the_point),
        "relevance": relevance,
        "courtesy": earned * _courtesy(sentences),
        "brevity": earned * brevity * (1.0 if sentences else 0.0),
    }
    return {**values, "gold": sum(values.values()), "refusal": float(refuses == due)}


def parts(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[dict[str, float]]:
    """Call `gold_parts` for a batch; every column is a list with one entry per completion."""
    used = {name: columns[name] for name in ("family", "facts")}
    return [
        gold_parts(prompt, completion, family=family, facts=facts)
        for prompt, completion, family, facts in zip(prompts, completions, used["family"], used["facts"], strict=True)
    ]


def gold(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return the gold scores (0 to 10), in trl's reward-function signature; needs the columns ``family``, ``facts``."""
    return [judged["gold"] for judged in parts(prompts, completions, **columns)]


def refused(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return 1.0 for each response that declines, rightly or not, else 0.0; for refusal rates by family."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(any(sentence in _REFUSALS for sentence in _sentences(text))) for text in texts]
