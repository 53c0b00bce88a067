"""What `rlhf best_of_n` makes of its samples: curves over n, the demonstrations that it keeps, the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.errors import InputError, unknown
from rlhf.rows.fields import further_columns
from rlhf.rows.records import Prompt

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from rlhf.evaluate import PolicySamples

SHOWN = 8
"""Prompts on the page."""


class Asked(Protocol):
    """The settings of `rlhf best_of_n` that are read here."""

    model: str
    data: str
    seed: int
    temperature: float
    max_new_tokens: int
    answer: str | None
    answer_column: str | None
    judge: str | None
    choose: str | None
    min_scores: dict[str, float] | None

    @property
    def pattern(self) -> re.Pattern[str]: ...


def check_choice(config: Asked, scorers: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Raise InputError, before anything is sampled, where `choose` names no way to choose or a prompt lacks the column
    of its answer."""
    for prompt in prompts if config.answer_column else ():
        if prompt.columns.get(str(config.answer_column)) is None:
            columns = ", ".join(sorted(prompt.columns)) or "none"
            raise InputError(f"{prompt.where or config.data}: no column {config.answer_column!r} (columns: {columns})")
    votes = ["majority", *(f"weighted_{name}" for name in scorers)] if config.answer or config.answer_column else []
    if chosen_by(config, scorers) not in (*scorers, *votes):
        unknown(chosen_by(config, scorers), [*scorers, *votes], "choose", "way to choose")


def chosen_by(config: Asked, scorers: Sequence[str]) -> str:
    return config.choose or next(iter(scorers), "majority")


def answers_of(config: Asked, samples: PolicySamples) -> list[list[Any]] | None:
    """Every response's answer, a list per prompt; None where nobody asked for answers."""
    from reward_models.best_of_n import extracted_answer

    if not (config.answer or config.answer_column):
        return None
    found = [extracted_answer(text, config.pattern) for text in samples.responses]
    return [found[start : start + samples.n] for start in range(0, len(found), samples.n)]


# ---------------------------------------------------------------- curves


def measure(
    config: Asked,
    samples: PolicySamples,
    scores: dict[str, np.ndarray],
    quality: np.ndarray | None,
    answers: list[list[Any]] | None,
) -> dict[str, Any]:
    """Curves of every method over n = 1 .. N, with intervals over prompts, and the numbers at N."""
    import numpy as np

    from reward_models import best_of_n as ways
    from rlhf.rows.records import split_key

    keys = [split_key(prompt) for prompt in samples.prompts]
    judged_by = config.judge or "each scorer's own score"
    if config.answer_column and answers is not None:
        quality = right_answers(config, samples.prompts, answers)
        judged_by = f"share of responses whose answer is the column {config.answer_column!r}"
    curves = {name: ways.scored_curves(own, own if quality is None else quality) for name, own in scores.items()}
    if answers is not None and quality is not None:
        votes = {"majority": np.ones_like(quality)}
        votes |= {f"weighted_{name}": ways.vote_weights(own) for name, own in scores.items()}
        curves |= {name: ways.vote_curves(answers, own, quality, config.seed) for name, own in votes.items()}
    metrics = {} if quality is None else {"policy": number(quality.mean(axis=1), keys, config.seed)}
    for name, curve in curves.items():
        metrics[f"{name}_at_{samples.n}"] = number(curve[:, -1], keys, config.seed)
        metrics[f"{name}_gain"] = gain(curve, keys, config.seed)
    points = {name: curve_points(curve, keys, config.seed, name in scores) for name, curve in curves.items()}
    return {"metrics": metrics, "curves": points, "judged_by": judged_by}


def right_answers(config: Asked, prompts: Sequence[Prompt], answers: list[list[Any]]) -> np.ndarray:
    """1 where a response gives the answer of the data's column, else 0."""
    import numpy as np

    from reward_models.best_of_n import extracted_answer

    right = np.zeros((len(answers), len(answers[0])))
    for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        given = prompt.columns[str(config.answer_column)]
        wanted = extracted_answer(str(given), config.pattern)
        if wanted is None:  # the column holds the answer alone, without what stands before it in a response
            wanted = extracted_answer(str(given), re.compile(r"(?s).+"))
        right[row] = [answer is not None and answer == wanted for answer in own]
    return right


def number(
    values: np.ndarray, keys: Sequence[str], seed: int, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> dict[str, float]:
    """A mean over prompts with its interval, which goes by the keys."""
    from rlhf.intervals import bootstrap_interval

    found = bootstrap_interval(values, seed, bounds=bounds, keys=keys)
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(values)}


def gain(curve: np.ndarray, keys: Sequence[str], seed: int) -> dict[str, float]:
    """How much the last point of a curve [prompts, n] is above the first, with its interval: a difference of shares
    lies between -1 and 1, one of scores anywhere."""
    shares = curve.min() >= 0 and curve.max() <= 1
    return number(curve[:, -1] - curve[:, 0], keys, seed, (-1.0, 1.0) if shares else None)


def curve_points(curve: np.ndarray, keys: Sequence[str], seed: int, ranked: bool) -> list[dict[str, Any]]:
    """A curve's points: n, the mean over prompts with its interval, and of best-of-n by a score the KL bound."""
    from rlhf.intervals import best_of_n_kl

    found = []
    for n in range(1, curve.shape[1] + 1):
        mean = number(curve[:, n - 1], keys, seed)
        ends = {name: mean[name] for name in ("value", "low", "high")}
        found.append({"n": n, **ends, "kl_nats": best_of_n_kl(n) if ranked else None})
    return found


# ---------------------------------------------------------------- demonstrations


def demonstrations(
    config: Asked,
    samples: PolicySamples,
    scores: dict[str, np.ndarray],
    answers: list[list[Any]] | None,
    model: Any,
) -> list[dict[str, Any]]:
    """A demonstration per prompt: the response that was chosen among those that stopped by themselves, have a text and
    reach `min_scores`. Each row says where it comes from, and holds its prompt's other columns (a row of demonstrations
    may not have some of them beside its prompt). model: the policy's fingerprint."""
    name = chosen_by(config, list(scores))
    fine = samples.by_prompt(samples.stopped) * samples.by_prompt([bool(text.strip()) for text in samples.responses])
    for scorer, least in (config.min_scores or {}).items():
        fine = fine * (scores[scorer] >= least)
    chosen = choices(name, scores, answers, fine.astype(bool))
    rows: list[dict[str, Any]] = []
    texts = samples.answers
    for place, (prompt, k) in enumerate(zip(samples.prompts, chosen, strict=True)):
        if k is None:
            continue
        columns = further_columns(prompt.columns)
        row = {"prompt": prompt.messages, "completion": [texts[place * samples.n + k]]}
        row |= {key: columns.pop(key) for key in ("tools", "chat_template_kwargs") if key in columns}
        made = {
            "made_by": "rlhf best_of_n", "model": config.model, "model_fingerprint": model, "n": samples.n, "sample": k,
            "seed": config.seed, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens,
            "chosen_by": name, "scores": {key: float(own[place, k]) for key, own in scores.items()},
            "prompt": columns.pop("provenance", None), "columns": columns,
        }  # fmt: skip
        rows.append(row | {"provenance": made})
    return rows


def choices(
    name: str, scores: dict[str, np.ndarray], answers: list[list[Any]] | None, fine: np.ndarray
) -> list[int | None]:
    """The number of the chosen response of every prompt; None where none of them is `fine`."""
    import numpy as np

    from reward_models.best_of_n import vote_weights, voted

    if name in scores:
        best = np.where(fine, scores[name], -np.inf).argmax(axis=1)
        return [int(k) if any_fine else None for k, any_fine in zip(best, fine.any(axis=1), strict=True)]
    assert answers is not None  # check_choice has seen to it
    weights = np.ones(fine.shape) if name == "majority" else vote_weights(scores[name.removeprefix("weighted_")])
    kept = [
        [a if good else None for a, good in zip(own, row, strict=True)] for own, row in zip(answers, fine, strict=True)
    ]
    return voted(kept, weights)


# ---------------------------------------------------------------- the page


def write_page(folder: Path, numbers: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """Write best_of_n.html: the curves with their intervals, the numbers at powers of two, some chosen responses."""
    from rlhf.run import page as html
    from rlhf.run.tables import number as shown

    curves, metrics = numbers["curves"], numbers["metrics"]
    listed = [row["n"] for row in next(iter(curves.values()), [])]
    sizes = [n for n in listed if n & (n - 1) == 0 or n == listed[-1]]
    table = [
        [name, *(f"{shown(p['value'])} [{shown(p['low'])}, {shown(p['high'])}]" for p in curve if p["n"] in sizes)]
        for name, curve in curves.items()
    ]
    gains = [[name.removesuffix("_gain"), *(shown(m[key]) for key in ("value", "low", "high")), f"{m['n']:,}"]
             for name, m in metrics.items() if name.endswith("_gain")]  # fmt: skip
    bound = "KL of best-of-n from the policy: at most ln n - (n - 1) / n nats; of a vote, at most ln n."
    examples = []
    for row in rows[:SHOWN]:
        made, asked = row["provenance"], "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        facts = " · ".join(f"{name} {shown(score)}" for name, score in made["scores"].items())
        examples.append(
            html.compared(asked, [html.Answer(f"sample {made['sample']}", facts, row["completion"][0]["content"])])
        )
    parts = [html.note(f"Measured: {numbers['judged_by']}. Intervals are over prompts.")]
    if curves:
        parts.append(f"<figure class=wide>{html.svg(lambda axes: draw(axes, curves), 4.6, 3.4)}</figure>")
        parts.append(html.table((["best of", *map(str, sizes)], table)))
        parts.append(html.note(bound))
        parts.append("<h2>Gain over one sample</h2>" + html.table((["by", "gain", "low", "high", "prompts"], gains)))
    parts.append("<h2>Chosen responses</h2>" + "".join(examples) if examples else "")
    return html.write(folder / "best_of_n.html", html.page(f"Best of n: {folder.name}", "\n".join(filter(None, parts))))


def draw(axes: Axes, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Draw every curve over n (on a log scale) with its interval."""
    from rlhf.run.page import FIRST, SECOND, WRONG, legend

    colors = [FIRST, SECOND, WRONG, "#0f9d76", "#7c3aed", "#6b7280"]
    for place, (name, curve) in enumerate(curves.items()):
        n, value, low, high = ([point[key] for point in curve] for key in ("n", "value", "low", "high"))
        color = colors[place % len(colors)]
        axes.plot(n, value, color=color, linewidth=1.6, marker="o" if len(n) < 20 else None, markersize=2.5, label=name)
        if all(map(math.isfinite, (*low, *high))):  # of a single prompt, the interval has no ends
            axes.fill_between(n, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("n")
    legend(axes)
