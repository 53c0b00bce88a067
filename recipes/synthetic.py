"""New prompts from seed prompts, by a model.

    rlhf synthetic --model runs/my/sft --data seeds.jsonl --count 200 \\
        --eval_data eval_prompts.jsonl --output_dir runs/my/synthetic
    rlhf best_of_n --model runs/my/sft --data runs/my/synthetic/prompts.jsonl \\
        --n 8 --scorers runs/my/reward_model --output_dir runs/my/answers

Self-instruct (Wang et al. 2212.10560): a model sees a few of the prompts and continues the list. What is too short or
long, equal or nearly equal to a seed prompt, an earlier new one or an evaluation prompt, or holds text of one (as
`rlhf contamination` looks for it), is left out and counted. Every prompt that stays says where it comes from.
`rlhf best_of_n` then samples answers, and keeps those that its scorers and rubric let pass.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped
from rlhf.rows.duplicates import NearDuplicates
from rlhf.rows.records import HELD_OUT, Prompt, read_prompts, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf_recipes.stage import SECTIONS, Stage, check_model, next_command, open_stage, reopen

console.quiet()

ASKED = "Come up with a series of tasks that somebody asks an assistant to do."
CUT_OFF = "the last task of an answer that was cut off (max_new_tokens)"
LATER = ("count", "max_requests", "near_duplicate", "min_words", "max_words", "eval_data", "generation_batch_size")
"""Settings that may change in an existing output_dir: what the model has written stays."""
SHOWN = 40
"""Prompts on the page."""
_ITEM = re.compile(r"(?m)^\s*(?:task\s*)?#?\d+\s*[.):]\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """New prompts from seed prompts."""

    model: str
    """The model that writes: a folder (full weights or adapter) or hub id."""
    data: str
    """Seed prompts; of a conversation, its last user turn."""
    eval_data: list[str] | None = None
    """Prompts of evaluation sets: no new prompt may be one of them, or nearly."""
    count: int = 100
    """New prompts wanted."""
    examples: int = 8
    """Prompts that one request shows (self-instruct: 8)."""
    new_examples: int = 2
    """At most so many of them are new ones, once there are any (self-instruct: 2)."""
    near_duplicate: float = 0.5
    """Similarity (Jaccard, of character 5-grams) from which on two prompts are nearly equal: about one word in six
    is another."""
    min_words: int = 3
    """Shorter prompts are left out (self-instruct: 3)."""
    max_words: int = 150
    """Longer prompts are left out (self-instruct: 150)."""
    instruction: str = ASKED
    """The first line of a request."""
    temperature: float = 1.0
    """Divides every logit."""
    max_new_tokens: int = 256
    """Longest continuation of the list; what it cuts off is left out."""
    requests_at_once: int = 16
    """Requests between two looks at what is new, which later ones may show."""
    max_requests: int = 1000
    """Requests after which it ends with fewer prompts than wanted."""
    output_dir: str = "runs/synthetic"
    """Where prompts, numbers and page go."""
    seed: int = 0
    """Decides which prompts a request shows, and every sample."""
    generation_batch_size: int = 256
    """Responses sampled at once; memory only."""
    bf16: bool | None = None
    """Run the model in bfloat16; null: where the hardware is fast at it."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        for name in ("count", "examples", "min_words", "max_new_tokens", "requests_at_once", "max_requests"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.new_examples <= self.examples:
            raise InputError(f"new_examples={self.new_examples} must lie between 0 and examples={self.examples}")
        if not 0 < self.near_duplicate <= 1:
            raise InputError(f"near_duplicate={self.near_duplicate} must be above 0 and at most 1 (1: equal only)")
        if self.max_words < self.min_words:
            raise InputError(f"max_words={self.max_words} is below min_words={self.min_words}")


def synthetic(config: SyntheticConfig) -> dict[str, Any]:
    """The stage: ask, filter, write. Of several processes the first works, and shares out the sampling."""
    return by_main(lambda: make(config))


def make(config: SyntheticConfig) -> dict[str, Any]:
    check_model(config.model, POLICIES)
    files = {f"eval_data.{file}": file for file in config.eval_data or []}
    sources = {"model": config.model, "data": config.data, "eval_data": None, **files}
    reopened = reopen("synthetic", config, sources, LATER)
    stage = open_stage("synthetic", config, sources, reopened)
    if stage.complete:
        return stage.outputs
    seeds = list(dict.fromkeys(asked_of(prompt) for prompt in read_prompts(config.data)))
    held_out = [asked_of(prompt) for file in config.eval_data or [] for prompt in read_prompts(file, HELD_OUT)]
    stage.begin()
    found = Found(config, seeds, held_out, stage.inputs["model"])
    ask(config, stage, found)
    if not found.rows:
        raise RunStopped(f"synthetic: no new prompt passed ({found.told}); try another model, or read samples.jsonl")
    write_jsonl(stage.folder / "prompts.jsonl", found.rows)
    numbers = {"metrics": found.metrics, "left_out": dict(found.left_out), "prompts": len(found.rows)}
    write_json_atomic(stage.folder / "synthetic.json", numbers)
    write_page(stage.folder, found)
    console.stage_line("synthetic", found.told)
    return stage.finish({"prompts": len(found.rows), "left_out": sum(found.left_out.values())})


def asked_of(prompt: Prompt) -> str:
    """The text of a prompt: its last turn."""
    return str(prompt.messages[-1]["content"])


class Found:
    """The new prompts so far, and how many were left out, by reason."""

    def __init__(self, config: SyntheticConfig, seeds: Sequence[str], held_out: Sequence[str], model: Any):
        self.config, self.seeds, self.held_out, self.model = config, seeds, held_out, model
        self.rows: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()
        self.known, self.evaluated = NearDuplicates(), NearDuplicates()
        for text in seeds:
            self.known.add(text)
        for text in held_out:
            self.evaluated.add(text)

    def see(self, text: str, request: int, shown: Sequence[str], copied: bool) -> None:
        """Keep a prompt, or count why not. copied: it holds text of an evaluation prompt."""
        words, near = len(text.split()), self.known.nearest(text)
        limit = self.config.near_duplicate
        reasons = {
            f"fewer than {self.config.min_words} words": words < self.config.min_words,
            f"more than {self.config.max_words} words": words > self.config.max_words,
            "equal to another": near.similarity == 1,
            f"nearly equal to another (similarity {limit:g} or more)": near.similarity >= limit,
            "equal or nearly equal to an evaluation prompt": self.evaluated.nearest(text).similarity >= limit,
            "with text of an evaluation prompt in it": copied,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None:
            self.left_out[why] += 1
            return
        self.known.add(text)
        config = self.config
        made = {
            "made_by": "rlhf synthetic", "model": config.model, "model_fingerprint": self.model, "request": request,
            "seed": config.seed, "temperature": config.temperature, "shown": list(shown),
            "nearest": near.text, "similarity": near.similarity,
        }  # fmt: skip
        self.rows.append({"prompt": text, "provenance": made})

    @property
    def told(self) -> str:
        short = f", asked for {self.config.count} (in {self.config.max_requests} requests: max_requests)"
        short = short if len(self.rows) < self.config.count else ""
        left = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"
        return f"{len(self.rows)} new prompts{short} from {len(self.seeds)} seed prompts; left out: {left}"

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The share of what was written that stays, and the mean similarity to the nearest other prompt."""
        import numpy as np

        from rlhf.intervals import bootstrap_interval, proportion

        written = len(self.rows) + sum(self.left_out.values())
        near = np.array([row["provenance"]["similarity"] for row in self.rows])
        found = {"kept_share": (proportion(len(self.rows), written), written)}
        found["similarity"] = (bootstrap_interval(near, self.config.seed), len(near))
        return {name: {"value": e.value, "low": e.low, "high": e.high, "n": n} for name, (e, n) in found.items()}


def ask(config: SyntheticConfig, stage: Stage, found: Found) -> None:
    """Ask until there are enough. Which prompts a request shows follows from its number and what was found before, and
    what the model wrote stays on disk: an interrupted run goes on to the same result."""
    from rlhf import chat, policies
    from rlhf.evals import contamination
    from rlhf.models.loading import load_tokenizer
    from rlhf.sampling.engine import model_stop_ids
    from rlhf.sampling.kept import KeptSamples

    tokenizer = load_tokenizer(config.model)
    model = policies.load(config.model, compute_dtype(config.bf16))
    stops = model_stop_ids(model, tokenizer)
    engine = policies.SharedEngine(model, stops, chat.pad_id(tokenizer), config.generation_batch_size)
    kept, bar = KeptSamples(stage.folder / "samples.jsonl", config.seed), console.StageBar("synthetic", config.count)
    for first in range(0, config.max_requests, config.requests_at_once):
        numbers = range(first, min(first + config.requests_at_once, config.max_requests))
        shown = [examples_of(config, found, number) for number in numbers]
        ids = [chat.encode_prompt(tokenizer, [{"role": "user", "content": request_of(config, own)}]) for own in shown]
        try:
            kept.draw(
                engine, ids, 1, lambda row: chat.decode_response(tokenizer, row, stops),
                max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                rows_at_once=engine.rows_at_once, device=model.device,
            )  # fmt: skip
        except InputError as error:  # too long for the model, most likely
            raise InputError(f"{error}; a request shows {len(shown[0])} prompts: fewer --examples shorten it") from None
        rows = kept.of(ids, 1)
        found.left_out.update(CUT_OFF for row in rows if not row.stopped)
        written = [
            (text, number, own)
            for number, own, row in zip(numbers, shown, rows, strict=True)
            for text in new_prompts(chat.parse_response(tokenizer, row.text)["content"], row.stopped)
        ]
        copied = contamination.holding([text for text, _, _ in written], found.held_out, contamination.Rules())
        for place, (text, number, own) in enumerate(written):
            if len(found.rows) < config.count:
                found.see(text, number, own, place in copied)
        bar.update(len(found.rows))
        if len(found.rows) == config.count:
            break
    bar.close()


def examples_of(config: SyntheticConfig, found: Found, number: int) -> list[str]:
    """The prompts that a request shows: seed prompts, and a few new ones once there are any."""
    draw = random.Random(f"{config.seed}:{number}")
    new = [row["prompt"] for row in found.rows]
    chosen = draw.sample(new, min(config.new_examples, len(new)))
    chosen += draw.sample(list(found.seeds), min(config.examples - len(chosen), len(found.seeds)))
    draw.shuffle(chosen)
    return chosen


def request_of(config: SyntheticConfig, shown: Sequence[str]) -> str:
    """The request: a numbered list, to be continued."""
    tasks = "\n".join(f"Task {number}: {' '.join(text.split())}" for number, text in enumerate(shown, 1))
    more = f"Continue the series with new tasks of other kinds, numbered from {len(shown) + 1}, one per line."
    return f"{config.instruction}\n\n{tasks}\n\n{more}"


def new_prompts(text: str, stopped: bool) -> list[str]:
    """The tasks in a continuation of the list: what stands behind their numbers, or, without any number, the whole
    text. Of a response that was cut off, the last one may be half a task and is left out."""
    parts = _ITEM.split(text)
    tasks = parts[1:] if len(parts) > 1 else parts
    tasks = tasks if stopped else tasks[:-1]
    return [task for part in tasks if (task := part.strip())]


def write_page(folder: Path, found: Found) -> Path:
    from rlhf.run import page as html

    counts = [["kept", f"{len(found.rows):,}"], *([why, f"{count:,}"] for why, count in found.left_out.most_common())]
    made = [(row["prompt"], row["provenance"]) for row in found.rows[:SHOWN]]
    rows = [[text, f"{by['similarity']:.2f}", by["nearest"]] for text, by in made]
    parts = [html.verdict(found.told + "."), html.table((["", "prompts"], counts))]
    parts.append("<h2>Prompts, each with the nearest other one</h2>")
    parts.append(html.table((["prompt", "similarity", "nearest"], rows)))
    return html.write(folder / "synthetic.html", html.page(f"New prompts: {folder.name}", "\n".join(parts)))


def main(argv: list[str]) -> None:
    config = configs.load(
        SyntheticConfig, argv, section="synthetic", known_sections=SECTIONS, description=__doc__ or ""
    )
    synthetic(config)
    also = ("--model", config.model, "--data", f"{config.output_dir}/prompts.jsonl")
    next_command("best_of_n", argv, config.output_dir, also=also)


if __name__ == "__main__":
    configs.run(main)
