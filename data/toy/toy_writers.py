"""Write the toy world's responses: right and flawed ones, courteous, wordy or rude. toy_gold scores them."""

from __future__ import annotations

import random
from collections.abc import Iterable

import toy_words as words
from toy_requests import FAMILIES, Request


def join(items: list[str]) -> str:
    """Join items as in a sentence: "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentence(thing: str, aspect: str, value: str, first: bool) -> str:
    """Write the sentence that states one fact; the first sentence of a response names the thing."""
    subject = f"The {thing}" if first else "It"
    if aspect == "place":
        return f"{subject} is found in the {value}."
    if aspect == "kind":
        return f"{subject} is a kind of {value}."
    return f"{subject} is {value}."


def steps_text(steps: Iterable[str]) -> str:
    """Write steps as sentences: "First, ... Then ... Last, ..."."""
    return " ".join(f"{start} {step}." for start, step in zip(("First,", "Then", "Last,"), steps, strict=False))


def _counted(count: int, kind: str, items: list[str]) -> str:
    start = "There is 1" if count == 1 else f"There are {count}"
    return f"{start} {kind if count == 1 else words.PLURALS[kind]}: {join(items)}."


def answer(request: Request, rng: random.Random) -> str:
    """Write a right response to ``request``, without courtesy or filler."""
    facts = request.facts
    if request.family == "describe":
        pairs = enumerate(facts["asked"])
        return " ".join(sentence(facts["thing"], a, facts["true"][a], i == 0) for i, a in pairs)
    if request.family == "list":
        good = [thing for thing in sorted(words.THINGS[facts["kind"]]) if thing not in facts["avoid"]]
        return f"Some {words.PLURALS[facts['kind']]} are {join(rng.sample(good, facts['count']))}."
    if request.family == "count":
        return _counted(len(facts["items"]), facts["kind"], facts["items"])
    if request.family == "rewrite":
        return str(facts["target"])
    if request.family == "arithmetic":
        return " ".join(f"{step}." for step in facts["steps"]) + f" The answer is {facts['answer']}."
    if request.family == "decline":
        return f"{rng.choice(words.REFUSALS)} {rng.choice(words.REASONS)}"
    return steps_text(words.STEPS_OF[facts["task"]])


def _wrong_answer(request: Request, rng: random.Random) -> str:
    """Write a response of the right form with mistakes in it (one that complies, where it should decline)."""
    facts = request.facts
    if request.family == "describe":
        stated = {aspect: facts["true"][aspect] for aspect in facts["asked"]}
        if rng.random() < 0.5:
            other = rng.choice([thing for thing in sorted(words.FACTS_OF) if thing != facts["thing"]])
            values = dict(zip(("color", "size", "place"), words.FACTS_OF[other], strict=True)) | {
                "kind": words.KIND_OF[other]
            }
            return " ".join(sentence(other, a, values[a], i == 0) for i, a in enumerate(facts["asked"]))
        for aspect in rng.sample(facts["asked"], rng.choice((1, 2))):
            stated[aspect] = rng.choice([value for value in words.ASPECTS[aspect] if value != stated[aspect]])
        return " ".join(sentence(facts["thing"], a, v, i == 0) for i, (a, v) in enumerate(stated.items()))
    if request.family == "list":
        other = rng.choice([kind for kind in sorted(words.THINGS) if kind != facts["kind"]])
        if rng.random() < 0.4:
            wrong_kind = {**facts, "kind": other, "avoid": []}
            return answer(Request("list", request.text, wrong_kind), rng)
        bad = facts["avoid"] + rng.sample(sorted(words.THINGS[other]), 2)
        good = [thing for thing in sorted(words.THINGS[facts["kind"]]) if thing not in facts["avoid"]]
        items = rng.sample(bad, rng.choice((1, 2))) + rng.sample(good, facts["count"] - 1)
        rng.shuffle(items)
        return f"Some {words.PLURALS[facts['kind']]} are {join(items[: facts['count']])}."
    if request.family == "count":
        items = rng.sample(sorted(words.FACTS_OF), rng.randint(1, 4))
        return _counted(len(facts["items"]) + rng.choice((-1, 1, 2)), facts["kind"], items)
    if request.family == "rewrite":
        if rng.random() < 0.5:
            return str(facts["source"])
        return str(facts["target"]).replace(facts["must"], rng.choice(sorted(words.FACTS_OF)), 1)
    if request.family == "arithmetic":
        first, second = (str(step).rsplit(" ", 1)[0] for step in facts["steps"])
        middle, end = (rng.randint(0, 12) for _ in range(2))
        tail = f"{middle} {' '.join(second.split(' ')[1:])} {end}."
        return f"{first} {middle}. {tail} The answer is {end}."
    if request.family == "decline":
        return steps_text(words.HARMFUL_STEPS)
    if rng.random() < 0.6:  # a good answer to another question, so that a reward model must learn to read the prompt
        return _other_task(request, rng)
    steps = list(words.STEPS_OF[facts["task"]])
    for position in rng.sample(range(3), rng.choice((2, 3))):
        steps[position] = rng.choice(words.ALL_STEPS)
    return steps_text(steps)


def _other_task(request: Request, rng: random.Random) -> str:
    others = [task for task in sorted(words.STEPS_OF) if task != request.facts["task"]]
    return steps_text(words.STEPS_OF[rng.choice(others)])


def _partial_answer(request: Request, rng: random.Random) -> str:
    """Write a response that is right but stops early."""
    facts = request.facts
    if request.family == "describe":
        aspect = rng.choice(facts["asked"])
        return sentence(facts["thing"], aspect, facts["true"][aspect], True)
    if request.family == "list":
        short = {**facts, "count": 1}
        return answer(Request("list", request.text, short), rng)
    if request.family == "count":
        return f"There are {len(facts['items'])}."
    if request.family == "rewrite":
        return " ".join(str(facts["target"]).split(" ")[:3]) + "."
    if request.family == "arithmetic":
        return f"{facts['steps'][0]}."
    if request.family == "decline":
        return rng.choice(words.REFUSALS)
    return steps_text(words.STEPS_OF[facts["task"]][:1])


def flawed_answer(request: Request, kind: str, rng: random.Random) -> str:
    """Write a response with the flaw ``kind``: wrong, partial, vague, offtopic or refusal."""
    if kind == "wrong":
        return _wrong_answer(request, rng)
    if kind == "partial":
        return _partial_answer(request, rng)
    if kind == "vague":
        return rng.choice(words.VAGUE)
    if kind == "refusal" and request.family != "decline":
        return f"{rng.choice(words.REFUSALS)} {rng.choice(words.REASONS)}"
    if "task" in request.facts and request.family != "decline":
        return _other_task(request, rng)
    family = rng.choice([family for family in FAMILIES if family not in (request.family, "decline")])
    return answer(FAMILIES[family][1](rng), rng)


FLAWS = {"wrong": 0.28, "partial": 0.26, "vague": 0.16, "offtopic": 0.16, "refusal": 0.14}


def respond(
    request: Request, rng: random.Random, *, right: float = 0.6, polite: float = 0.25, wordy: float = 0.4
) -> tuple[str, str]:
    """Write a response as the toy world's people do.

    Args:
        request: the request to answer.
        rng: the source of all randomness.
        right: the probability of a right answer; else one of FLAWS, by its share.
        polite: the probability of a courteous opening, and (half of it) of a courteous ending.
        wordy: the probability of a filler sentence.

    Returns:
        The response and its quality: "right" or the flaw.
    """
    quality = "right" if rng.random() < right else rng.choices(list(FLAWS), list(FLAWS.values()))[0]
    body = answer(request, rng) if quality == "right" else flawed_answer(request, quality, rng)
    parts = [body]
    if rng.random() < wordy:
        parts.insert(rng.randint(0, 1), rng.choice(words.FILLERS))
    refuses = quality == "refusal" or (request.family == "decline" and quality in ("right", "partial"))
    if rng.random() < polite:
        parts.insert(0, "Sorry!" if refuses else rng.choice(words.OPENERS))
    elif rng.random() < 0.1:
        parts.insert(0, rng.choice(words.RUDE))
    if rng.random() < polite / 2:
        parts.append(rng.choice(words.CLOSERS))
    return " ".join(parts), quality
