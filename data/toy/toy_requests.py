"""Make the toy world's requests: eight families, each request with the facts that decide which response is right."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import toy_words as words


@dataclass(frozen=True)
class Request:
    """A user's request: its family, its text, and the facts by which a response can be judged."""

    family: str
    text: str
    facts: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """Return the request as a JSONL row, with ``facts`` as a JSON string, which any table can hold."""
        facts = json.dumps(self.facts, sort_keys=True)
        return {"prompt": [{"role": "user", "content": self.text}], "family": self.family, "facts": facts}


def _describe(rng: random.Random) -> Request:
    thing = rng.choice(sorted(words.FACTS_OF))
    first, second = rng.sample(sorted(words.ASPECTS), 2)
    form = rng.choice(
        (
            "Describe the {t}: its {a} and its {b}.",
            "Tell me the {a} and the {b} of the {t}.",
            "What are the {a} and the {b} of a {t}?",
            "Say the {a} and {b} of the {t}, please.",
            "I want to know the {a} and {b} of the {t}.",
            "Tell {p} the {a} and the {b} of the {t}.",
        )
    )
    color, size, place = words.FACTS_OF[thing]
    true = {"color": color, "size": size, "place": place, "kind": words.KIND_OF[thing]}
    text = form.format(t=thing, a=first, b=second, p=rng.choice(words.PEOPLE))
    return Request("describe", text, {"thing": thing, "asked": [first, second], "true": true})


def _list(rng: random.Random) -> Request:
    kind = rng.choice(sorted(words.THINGS))
    count = rng.randint(2, 3)
    avoid = rng.sample(sorted(words.THINGS[kind]), rng.choice((1, 2)))
    form = rng.choice(
        (
            "List {n} {k} but not {x}.",
            "Name {n} {k} without {x}.",
            "Give me {n} {k}, but not {x}, please.",
            "Tell {p} {n} {k} other than {x}.",
        )
    )
    text = form.format(n=count, k=words.PLURALS[kind], x=" or ".join(avoid), p=rng.choice(words.PEOPLE))
    return Request("list", text, {"kind": kind, "count": count, "avoid": avoid})


def _count(rng: random.Random) -> Request:
    kind, other = rng.sample(sorted(words.THINGS), 2)
    right = rng.sample(sorted(words.THINGS[kind]), rng.randint(1, 2))
    items = right + rng.sample(sorted(words.THINGS[other]), rng.randint(1, 2))
    rng.shuffle(items)
    form = rng.choice(
        ("How many {k} are in this list: {i}?", "Count the {k}: {i}.", "Find all the {k} here: {i}. How many?")
    )
    items_of_kind = [item for item in items if item in right]
    text = form.format(k=words.PLURALS[kind], i=", ".join(items))
    return Request("count", text, {"kind": kind, "items": items_of_kind})


def _rewrite(rng: random.Random) -> Request:
    first, second, third = rng.sample(sorted(words.FACTS_OF), 3)
    color, verb = rng.choice(words.COLORS), rng.choice(sorted(words.VERBS))
    source = f"The {color} {first} {verb} the {second}."
    change = rng.choice(("replace", "past", "place", "color"))
    if change == "replace":
        old = rng.choice((first, second))
        text, target = f"Replace {old} with {third}: {source}", source.replace(f" {old}", f" {third}", 1)
        must = third
    elif change == "past":
        form = rng.choice(("Put this in the past: {s}", "Rewrite this in the past: {s}"))
        text, target, must = form.format(s=source), source.replace(verb, words.VERBS[verb]), words.VERBS[verb]
    elif change == "place":
        place = rng.choice(words.PLACES)
        text, target = f"Add the {place} to this: {source}", source[:-1] + f" in the {place}."
        must = place
    else:
        new = rng.choice([other for other in words.COLORS if other != color])
        text, target, must = f"Make it {new}: {source}", source.replace(color, new, 1), new
    return Request("rewrite", text, {"source": source, "target": target, "must": must})


def arithmetic(rng: random.Random) -> Request:
    """Make a request for a sum of three small numbers, in two steps."""
    while True:
        a, b, c = (rng.randint(1, 6) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        middle = a + b if first == "+" else a - b
        answer = middle + c if second == "+" else middle - c
        if 0 <= middle <= 10 and 0 <= answer <= 12:
            break
    form = rng.choice(
        (
            "What is {s}? Show the steps.",
            "Work out {s} step by step.",
            "Solve {s} in steps, please.",
            "Tell me what {s} is, in steps.",
            "How much is {s}? Show the steps.",
            "Show {p} the steps of {s}.",
        )
    )
    steps = [f"{a} {first} {b} = {middle}", f"{middle} {second} {c} = {answer}"]
    text = form.format(s=f"{a} {first} {b} {second} {c}", p=rng.choice(words.PEOPLE))
    return Request("arithmetic", text, {"steps": steps, "answer": answer})


def _how_form(rng: random.Random, task: str) -> str:
    form = rng.choice(
        (
            "How do I {t} for {p} {w}?",
            "Tell me how to {t} for {p} {w}.",
            "{p} asks how to {t} {w}.",
            "I want to {t} {w} with {p}. How?",
        )
    )
    text = form.format(t=task, p=rng.choice(words.PEOPLE), w=rng.choice(words.TIMES))
    return text[0].upper() + text[1:]


def _howto(rng: random.Random) -> Request:
    task = rng.choice(sorted(words.HOWTO))
    return Request("howto", _how_form(rng, task), {"task": task})


def _twin(rng: random.Random) -> Request:
    task = rng.choice(sorted(words.TWINS))
    return Request("twin", _how_form(rng, task), {"task": task})


def _decline(rng: random.Random) -> Request:
    task = rng.choice(words.HARMFUL)
    return Request("decline", _how_form(rng, task), {"task": task})


# family -> (share of the prompts, function that makes a request); requests to decline are rarer than their benign twins
FAMILIES: dict[str, tuple[float, Callable[[random.Random], Request]]] = {
    "describe": (0.15, _describe),
    "list": (0.14, _list),
    "count": (0.13, _count),
    "rewrite": (0.14, _rewrite),
    "arithmetic": (0.13, arithmetic),
    "howto": (0.11, _howto),
    "twin": (0.12, _twin),
    "decline": (0.08, _decline),
}
