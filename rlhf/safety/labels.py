"""People's labels of answers (full, partial, none, other), a detector's error measured on them, and rates corrected by
it.

A detector that errs gives a wrong rate with a narrow interval. Where people have labelled a random part of the very
answers that are counted, the rate is corrected by these (`rlhf.evals.correction`: right whatever the detector is
worth). Where their labels are of other models' answers (XSTest's completions, say), only the detector's error is known
from them, and `prevalence` corrects by that error. This is right as far as the detector errs on the new model as it did
on the others: `leave_one_out` measures how far that holds, by correcting each labelled model by the others' error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.errors import InputError, short
from rlhf.evals.correction import FEWEST
from rlhf.intervals import Estimate, proportion
from rlhf.rows.fields import prompt_fields
from rlhf.rows.messages import Messages, check_text
from rlhf.rows.records import HELD_OUT, prompt_key
from rlhf.rows.sources import rows, wrong
from rlhf.safety.refusals import KINDS, Kind

XSTEST: dict[str, Kind] = {"1_full_compliance": "none", "2_full_refusal": "full", "3_partial_refusal": "partial"}
"""The labels in XSTest's files of completions."""
_RESPONSES = ("response", "completion", "answer", "target_response")


@dataclass(frozen=True)
class Label:
    """What people say of one answer."""

    prompt: Messages
    response: str
    kind: Kind
    model: str = ""
    """Who wrote the answer; "" where that is not known."""
    where: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Return what identifies the answer: its prompt and its text."""
        return prompt_key(self.prompt), self.response.strip()


def read_labels(source: str) -> list[Label]:
    """Read labels: rows of prompt, response and label (and model), or XSTest's completions, whose file's name says the
    model. Rows without a label are left out. Raises InputError."""
    found: list[Label] = []
    for where, row in rows(source, HELD_OUT):
        if not isinstance(row, dict):
            raise wrong(where, f"got a {type(row).__name__}", "write an object of prompt, response and label")
        name = next((name for name in ("label", "final_label") if row.get(name) is not None), None)
        if name is None:
            continue
        said = str(row[name]).strip()
        kind = XSTEST.get(said, said)
        if kind not in KINDS:
            known = ", ".join((*KINDS, *XSTEST))
            raise wrong(f"{where}: {name}", f"got {short(repr(row[name]))}", f"write one of {known}")
        response = next((row[name] for name in _RESPONSES if row.get(name) is not None), None)
        if not isinstance(response, str):
            raise wrong(f"{where}: response", f"got {short(repr(response))}", "write the answer that was labelled")
        try:
            messages = prompt_fields({"prompt": row.get("prompt")})[0]
            if row.get("model"):
                check_text(row["model"], "model")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        model = str(row.get("model") or _model_of(where))
        found.append(Label(messages, response, kind, model, where))  # type: ignore[arg-type]
    if not found:
        raise wrong(source, "no row has a label", "write full, partial, none or other into the column label")
    return found


def _model_of(where: str) -> str:
    named = re.match(r"xstest_v2_completions_(\w+?)(?:_(?:gpteval|streval))?\.csv", Path(where.rpartition(":")[0]).name)
    return named[1] if named else ""


# ------------------------------------------------------------------------------------------------- a detector's error


@dataclass(frozen=True)
class Error:
    """How a detector of one kind of answer errs: what it said of answers that people say are (or are not) of it.

    Counts are of independent answers that would tell as much as the labels do, and need not be whole."""

    hits: float
    """Found, of `positives`."""
    positives: float
    quiet: float
    """Not found, of `negatives`."""
    negatives: float
    labels: int = 0
    """From how many labels this was counted."""

    @classmethod
    def of(cls, said: Sequence[bool], true: Sequence[bool], keys: Sequence[tuple[str, str]]) -> Error:
        """Count what a detector said beside what is true. keys: each label's prompt and answer (`Label.key`)."""
        hits, positives = _counted(said, true, keys)
        quiet, negatives = _counted([not s for s in said], [not t for t in true], keys)
        return cls(hits, positives, quiet, negatives, len(keys))

    @property
    def usable(self) -> bool:
        """Return whether a rate can be corrected by it: enough labels of either kind, and it tells them apart."""
        return min(self.positives, self.negatives) >= FEWEST and self.sensitivity + self.specificity > 1.1

    @property
    def sensitivity(self) -> float:
        return self.hits / self.positives if self.positives else float("nan")

    @property
    def specificity(self) -> float:
        return self.quiet / self.negatives if self.negatives else float("nan")

    def metrics(self, name: str) -> dict[str, dict[str, float]]:
        """Return sensitivity and specificity with their intervals, as metrics of this name."""
        counts = {"sensitivity": (self.hits, self.positives), "specificity": (self.quiet, self.negatives)}
        return {
            f"{name}/{what}": dict(zip(("value", "low", "high"), proportion(right, n), strict=True)) | {"n": round(n)}
            for what, (right, n) in counts.items()
            if n
        }


def _counted(said: Sequence[bool], true: Sequence[bool], keys: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Return how many answers that are `true` a detector found, and of how many independent ones.

    People's labels of an answer are averaged, and the answers to a prompt: an answer weighs by the share of people who
    call it true. With the means x of G prompts, and as in `clustered_mean` a prompt more at 0 and at 1, r is their mean
    and v its variance; as many independent answers have v = r (1 - r) / (n + 1). n is G where every mean is 0 or 1, and
    never more than there are answers."""
    people, found = dict[tuple[str, str], list[bool]](), dict(zip(keys, said, strict=True))
    for key, one in zip(keys, true, strict=True):
        people.setdefault(key, []).append(one)
    prompts: dict[str, list[tuple[float, bool]]] = {}
    for key, votes in people.items():
        if any(votes):
            prompts.setdefault(key[0], []).append((sum(votes) / len(votes), found[key]))
    if not prompts:
        return 0.0, 0.0
    means = [sum(w * f for w, f in own) / sum(w for w, _ in own) for own in prompts.values()]
    x = np.array([*means, 0.0, 1.0])
    spread = float(((x - x.mean()) ** 2).mean()) / (len(x) - 1)
    n = min(float(x.mean() * (1 - x.mean())) / spread - 1, float(sum(len(own) for own in prompts.values())))
    return n * float(np.mean(means)), n


def prevalence(found: int, n: int, error: Error, z: float = 1.959964) -> Estimate:
    """Correct the share ``found / n`` by a detector's error (Rogan and Gladen 1978), with the interval of Lang and
    Reiczigel (2014), which knows that the error itself is measured on few labels. ::

        p = (q + Sp - 1) / (Se + Sp - 1)

    with q the share, Se the sensitivity and Sp the specificity. For the interval, q is counted with z^2 / 2 more of
    both, Se and Sp with 1 more of both, and with n' the counts so enlarged::

        p'     = (q' + Sp' - 1) / (Se' + Sp' - 1)
        shift  = 2 z^2 (p' Se' (1 - Se') / n_1' - (1 - p') Sp' (1 - Sp') / n_0')
        s^2    = (q' (1 - q') / n' + p'^2 Se' (1 - Se') / n_1' + (1 - p')^2 Sp' (1 - Sp') / n_0') / (Se' + Sp' - 1)^2

    it is p' + shift +- z s, cut at 0 and 1. Coverage, simulated: tests/safety/test_labels.py. Raises ValueError where
    the detector tells nothing apart (`Error.usable`).
    """
    if not error.usable:
        raise ValueError("this error corrects nothing: too few labels, or a detector that tells nothing apart")
    plain = (found / n + error.specificity - 1) / (error.sensitivity + error.specificity - 1)
    size, positives, negatives = n + z * z, error.positives + 2, error.negatives + 2
    q = (found + z * z / 2) / size
    se, sp = (error.hits + 1) / positives, (error.quiet + 1) / negatives
    power = se + sp - 1
    p = (q + sp - 1) / power
    of_se, of_sp = se * (1 - se) / positives, sp * (1 - sp) / negatives
    shift = 2 * z * z * (p * of_se - (1 - p) * of_sp)
    half = z * (q * (1 - q) / size + p * p * of_se + (1 - p) ** 2 * of_sp) ** 0.5 / power
    value = min(1.0, max(0.0, plain))
    low, high = max(0.0, p + shift - half), min(1.0, p + shift + half)
    return Estimate(value, min(value, low), max(value, high))


class HeldOut(NamedTuple):
    """One labelled model, judged by a detector whose error was measured on the others alone."""

    model: str
    n: int
    """Its labelled answers."""
    labels: float
    """The share that people say."""
    raw: float
    """The share that the detector says."""
    corrected: Estimate | None
    """None where the others' labels correct nothing."""
    agreement: float
    kappa: float
    """Agreement beyond chance."""

    @property
    def inside(self) -> bool | None:
        """Return whether the corrected interval holds what people say."""
        return None if self.corrected is None else self.corrected.low <= self.labels <= self.corrected.high


def leave_one_out(labels: Sequence[Label], said: Sequence[Kind], kind: Kind) -> list[HeldOut]:
    """Hold out each labelled model in turn, and correct its share of answers of a kind by the error on the others."""
    rows_of: dict[str, list[int]] = {}
    for n, label in enumerate(labels):
        rows_of.setdefault(label.model, []).append(n)
    found = []
    for model, own in rows_of.items():
        others = [n for n in range(len(labels)) if labels[n].model != model]
        is_kind, keys = [labels[n].kind == kind for n in others], [labels[n].key for n in others]
        error = Error.of([said[n] == kind for n in others], is_kind, keys)
        claimed, people = {labels[n].key: said[n] == kind for n in own}, dict[tuple[str, str], list[bool]]()
        for n in own:
            people.setdefault(labels[n].key, []).append(labels[n].kind == kind)
        count, raw = len(people), sum(claimed.values())
        true = sum(sum(votes) / len(votes) for votes in people.values()) / count
        corrected = prevalence(raw, count, error) if error.usable else None
        pairs = [(said[n] == kind, labels[n].kind == kind) for n in own]
        agreed = sum(s == t for s, t in pairs) / len(own)
        found.append(HeldOut(model, count, true, raw / count, corrected, agreed, _kappa(agreed, pairs)))
    return found


def _kappa(agreed: float, pairs: Sequence[tuple[bool, bool]]) -> float:
    first, second = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    return (agreed - chance) / (1 - chance) if chance < 1 else 1.0


def table(held_out: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """Return the held-out models as rows that JSON can hold."""
    return [
        {**one._asdict(), "corrected": one.corrected and one.corrected._asdict(), "inside": one.inside}
        for one in held_out
    ]  # fmt: skip
