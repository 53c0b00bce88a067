"""The toy world: a seeded, offline miniature of the whole RLHF job.

Eight families of requests, writers of right and of flawed responses, and :func:`make`, which writes the four
JSONL files that the chain reads. What a response is worth is said by toy_gold, never here.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toy_words as words


@dataclass(frozen=True)
class Request:
    """A user's request: what is asked, its family, and the facts by which a response can be judged."""

    family: str
    text: str
    facts: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The request as a JSONL row; ``facts`` travels as a JSON string, so that any table can hold it."""
        facts = json.dumps(self.facts, sort_keys=True)
        return {"prompt": [{"role": "user", "content": self.text}], "family": self.family, "facts": facts}


# ----------------------------------------------------------------------------------------------- requests


def _describe(rng: random.Random) -> Request:
    thing = rng.choice(sorted(words.FACTS_OF))
    first, second = rng.sample(sorted(words.ASPECTS), 2)
    form = rng.choice(
        (
            "Describe the {t}: its {a} and its {b}.",
            "Tell me the {a} and the {b} of the {t}.",
            "What are the {a} and the {b} of a {t}?",
            "Say the {a} and {b} of the {t}, please.",
        )
    )
    color, size, place = words.FACTS_OF[thing]
    true = {"color": color, "size": size, "place": place, "kind": words.KIND_OF[thing]}
    return Request(
        "describe", form.format(t=thing, a=first, b=second), {"thing": thing, "asked": [first, second], "true": true}
    )


def _list(rng: random.Random) -> Request:
    kind = rng.choice(sorted(words.THINGS))
    count = rng.randint(2, 4)
    avoid = rng.sample(sorted(words.THINGS[kind]), rng.choice((1, 2)))
    form = rng.choice(
        ("List {n} {k} but not {x}.", "Name {n} {k} without {x}.", "Give me {n} {k}, but not {x}, please.")
    )
    text = form.format(n=count, k=words.PLURALS[kind], x=" or ".join(avoid))
    return Request("list", text, {"kind": kind, "count": count, "avoid": avoid})


def _count(rng: random.Random) -> Request:
    kind, other = rng.sample(sorted(words.THINGS), 2)
    right = rng.sample(sorted(words.THINGS[kind]), rng.randint(1, 3))
    items = right + rng.sample(sorted(words.THINGS[other]), rng.randint(1, 2))
    rng.shuffle(items)
    form = rng.choice(
        ("How many {k} are in this list: {i}?", "Count the {k}: {i}.", "Find all the {k} here: {i}. How many?")
    )
    items_of_kind = [item for item in items if item in right]
    return Request("count", form.format(k=words.PLURALS[kind], i=", ".join(items)), {"kind": kind, "items": items_of_kind})


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


def _arithmetic(rng: random.Random) -> Request:
    while True:
        a, b, c = (rng.randint(1, 7) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        middle = a + b if first == "+" else a - b
        answer = middle + c if second == "+" else middle - c
        if 0 <= middle <= 12 and 0 <= answer <= 15:
            break
    form = rng.choice(
        (
            "What is {s}? Show the steps.",
            "Work out {s} step by step.",
            "Solve {s} in steps, please.",
            "Tell me what {s} is, in steps.",
            "How much is {s}? Show the steps.",
        )
    )
    steps = [f"{a} {first} {b} = {middle}", f"{middle} {second} {c} = {answer}"]
    return Request("arithmetic", form.format(s=f"{a} {first} {b} {second} {c}"), {"steps": steps, "answer": answer})


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


# family -> (share of the prompts, who makes a request); declined requests are few, their benign twins more
FAMILIES: dict[str, tuple[float, Callable[[random.Random], Request]]] = {
    "describe": (0.15, _describe),
    "list": (0.14, _list),
    "count": (0.13, _count),
    "rewrite": (0.14, _rewrite),
    "arithmetic": (0.13, _arithmetic),
    "howto": (0.11, _howto),
    "twin": (0.12, _twin),
    "decline": (0.08, _decline),
}

# ---------------------------------------------------------------------------------------------- responses


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _sentence(thing: str, aspect: str, value: str, first: bool) -> str:
    subject = f"The {thing}" if first else "It"
    if aspect == "place":
        return f"{subject} is found in the {value}."
    if aspect == "kind":
        return f"{subject} is a kind of {value}."
    return f"{subject} is {value}."


def _steps(steps: Iterable[str]) -> str:
    return " ".join(f"{start} {step}." for start, step in zip(("First,", "Then", "Last,"), steps, strict=False))


def _counted(count: int, kind: str, items: list[str]) -> str:
    start = "There is 1" if count == 1 else f"There are {count}"
    return f"{start} {kind if count == 1 else words.PLURALS[kind]}: {_join(items)}."


def answer(request: Request, rng: random.Random) -> str:
    """A right response to ``request``, bare: no courtesy, nothing too much."""
    facts = request.facts
    if request.family == "describe":
        pairs = enumerate(facts["asked"])
        return " ".join(_sentence(facts["thing"], a, facts["true"][a], i == 0) for i, a in pairs)
    if request.family == "list":
        good = [thing for thing in sorted(words.THINGS[facts["kind"]]) if thing not in facts["avoid"]]
        return f"Some {words.PLURALS[facts['kind']]} are {_join(rng.sample(good, facts['count']))}."
    if request.family == "count":
        return _counted(len(facts["items"]), facts["kind"], facts["items"])
    if request.family == "rewrite":
        return str(facts["target"])
    if request.family == "arithmetic":
        return " ".join(f"{step}." for step in facts["steps"]) + f" The answer is {facts['answer']}."
    if request.family == "decline":
        return f"{rng.choice(words.REFUSALS)} {rng.choice(words.REASONS)}"
    return _steps(words.STEPS_OF[facts["task"]])


def _wrong_answer(request: Request, rng: random.Random) -> str:
    """To the point, but with mistakes in it (for declined requests: it complies)."""
    facts = request.facts
    if request.family == "describe":
        told = {aspect: facts["true"][aspect] for aspect in facts["asked"]}
        for aspect in rng.sample(facts["asked"], rng.choice((1, 2))):
            told[aspect] = rng.choice([value for value in words.ASPECTS[aspect] if value != told[aspect]])
        return " ".join(_sentence(facts["thing"], a, v, i == 0) for i, (a, v) in enumerate(told.items()))
    if request.family == "list":
        other = rng.choice([kind for kind in sorted(words.THINGS) if kind != facts["kind"]])
        bad = facts["avoid"] + rng.sample(sorted(words.THINGS[other]), 2)
        good = [thing for thing in sorted(words.THINGS[facts["kind"]]) if thing not in facts["avoid"]]
        items = rng.sample(bad, rng.choice((1, 2))) + rng.sample(good, facts["count"] - 1)
        rng.shuffle(items)
        return f"Some {words.PLURALS[facts['kind']]} are {_join(items[: facts['count']])}."
    if request.family == "count":
        items = rng.sample(sorted(words.FACTS_OF), rng.randint(1, 4))
        return _counted(len(facts["items"]) + rng.choice((-1, 1, 2)), facts["kind"], items)
    if request.family == "rewrite":
        if rng.random() < 0.5:
            return str(facts["source"])
        return str(facts["target"]).replace(facts["must"], rng.choice(sorted(words.FACTS_OF)), 1)
    if request.family == "arithmetic":
        first, second = (str(step).rsplit(" ", 1)[0] for step in facts["steps"])
        middle, end = (rng.randint(0, 15) for _ in range(2))
        tail = f"{middle} {' '.join(second.split(' ')[1:])} {end}."
        return f"{first} {middle}. {tail} The answer is {end}."
    if request.family == "decline":
        return _steps(words.HARMFUL_STEPS)
    steps = list(words.STEPS_OF[facts["task"]])
    for place in rng.sample(range(3), rng.choice((2, 3))):
        steps[place] = rng.choice(words.ALL_STEPS)
    return _steps(steps)


def _partial_answer(request: Request, rng: random.Random) -> str:
    """Right as far as it goes, but it stops early."""
    facts = request.facts
    if request.family == "describe":
        aspect = rng.choice(facts["asked"])
        return _sentence(facts["thing"], aspect, facts["true"][aspect], True)
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
    return _steps(words.STEPS_OF[facts["task"]][:1])


def flawed_answer(request: Request, kind: str, rng: random.Random) -> str:
    """A response with the flaw ``kind``: wrong, partial, vague, offtopic or refusal."""
    if kind == "wrong":
        return _wrong_answer(request, rng)
    if kind == "partial":
        return _partial_answer(request, rng)
    if kind == "vague":
        return rng.choice(words.VAGUE)
    if kind == "refusal" and request.family != "decline":
        return f"{rng.choice(words.REFUSALS)} {rng.choice(words.REASONS)}"
    family = rng.choice([family for family in FAMILIES if family not in (request.family, "decline")])
    return answer(FAMILIES[family][1](rng), rng)


FLAWS = {"wrong": 0.42, "partial": 0.22, "vague": 0.12, "offtopic": 0.14, "refusal": 0.10}


def respond(
    request: Request, rng: random.Random, *, right: float = 0.6, polite: float = 0.2, wordy: float = 0.25
) -> tuple[str, str]:
    """A response as the toy world's people write them.

    Args:
        request: what is asked.
        rng: the source of all its chances.
        right: the probability of a right answer; else one of FLAWS, by its share.
        polite: the probability of a courteous opening, and (half of it) of a courteous ending.
        wordy: the probability of a sentence that says nothing.

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


# ------------------------------------------------------------------------------------------------- the files


def requests(rng: random.Random, count: int, seen: set[str], balanced: bool = False) -> list[Request]:
    """``count`` requests whose texts are new to ``seen`` (which grows), by the families' shares or balanced.

    Raises:
        ValueError: a family has no new request left.
    """
    shares = {family: 1 / len(FAMILIES) if balanced else share for family, (share, _) in FAMILIES.items()}
    wanted = {family: int(count * share) for family, share in shares.items()}
    for family in list(FAMILIES)[: count - sum(wanted.values())]:
        wanted[family] += 1
    found: list[Request] = []
    for family, number in wanted.items():
        misses = 0
        while number > 0:
            request = FAMILIES[family][1](rng)
            if request.text in seen:
                misses += 1
                if misses > 5000:
                    raise ValueError(f"family {family} has no new prompts left ({number} missing); ask for fewer")
                continue
            seen.add(request.text)
            found.append(request)
            number, misses = number - 1, 0
    rng.shuffle(found)
    return found


_SAYABLE = [*sorted(words.FACTS_OF), *words.COLORS, *words.PLACES, *words.VERBS, *(str(n) for n in range(16))]


def _statement(rng: random.Random) -> str:
    """A plain true statement, or words said twice (from which copying is learnt), as a document of its own."""
    kind = rng.randrange(7)
    if kind == 0:
        thing = rng.choice(sorted(words.FACTS_OF))
        color, size, place = words.FACTS_OF[thing]
        told = {"color": color, "size": size, "place": place, "kind": words.KIND_OF[thing]}
        aspects = rng.sample(sorted(told), 4)
        return " ".join(_sentence(thing, aspect, told[aspect], i == 0) for i, aspect in enumerate(aspects))
    if kind == 1:
        task = rng.choice(sorted(words.STEPS_OF))
        return f"To {task}: {_steps(words.STEPS_OF[task])}"
    if kind == 2:
        sums = [_arithmetic(rng).facts["steps"][0] for _ in range(4)]
        return " ".join(f"{step}." for step in sums)
    if kind >= 4:
        said = " ".join(rng.choices(_SAYABLE, k=rng.randint(4, 9)))
        return f"{said}. {said}."
    name = rng.choice(sorted(words.THINGS))
    return f"Some {words.PLURALS[name]} are {_join(rng.sample(sorted(words.THINGS[name]), 4))}."


def _documents(rng: random.Random, count: int, held_out: set[str], right: float) -> Iterator[dict[str, Any]]:
    families, shares = list(FAMILIES), [share for share, _ in FAMILIES.values()]
    while count > 0:
        if rng.random() < 0.3:
            yield {"text": _statement(rng)}
        else:
            request = FAMILIES[rng.choices(families, shares)[0]][1](rng)
            if request.text in held_out:
                continue
            response, _ = respond(request, rng, right=right, polite=0.15, wordy=0.15)
            yield {"messages": [*request.row()["prompt"], {"role": "assistant", "content": response}]}
        count -= 1


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def make(
    folder: str | Path,
    seed: int = 0,
    prompts: int = 7000,
    demonstrations: int = 2500,
    pretraining_documents: int = 24000,
    evaluation_prompts: int = 400,
    right: float = 0.6,
    pretraining_right: float = 0.85,
) -> dict[str, Any]:
    """Writes the toy world's data into ``folder``; the same arguments give the same bytes.

    ``pretraining.jsonl`` (one document per row: ``messages`` or ``text``), ``demonstrations.jsonl`` (prompt and
    completion), ``prompts.jsonl`` (for comparisons and PPO) and ``eval_prompts.jsonl`` (balanced over the families).
    The last three share no prompt, and the evaluation's are in no other file.

    Args:
        folder: where to; made if missing.
        seed: decides everything.
        prompts, demonstrations, pretraining_documents, evaluation_prompts: rows per file.
        right: share of right answers among the demonstrations.
        pretraining_right: the same for the conversations of the pretraining documents.

    Returns:
        Rows per file, and rows per family for each file of prompts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(seed), set[str]()
    held_out = requests(rng, evaluation_prompts, seen, balanced=True)
    held_out_texts = set(seen)
    shown = requests(rng, demonstrations, seen)
    asked = requests(rng, prompts, seen)

    def demonstration(request: Request) -> dict[str, Any]:
        response, quality = respond(request, rng, right=right)
        return {**request.row(), "completion": [{"role": "assistant", "content": response}], "quality": quality}

    rows: dict[str, Iterable[dict[str, Any]]] = {
        "eval_prompts": (request.row() for request in held_out),
        "demonstrations": (demonstration(request) for request in shown),
        "prompts": (request.row() for request in asked),
        "pretraining": _documents(rng, pretraining_documents, held_out_texts, pretraining_right),
    }
    report: dict[str, Any] = {name: _write(folder / f"{name}.jsonl", rows[name]) for name in rows}
    for name, made in (("eval_prompts", held_out), ("demonstrations", shown), ("prompts", asked)):
        report[f"{name}_by_family"] = dict(Counter(request.family for request in made))
    return report
