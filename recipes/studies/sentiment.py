"""RLHF's first task on text, run as a user would: sentiment.yaml's chain, baselines, a second judge, fluency.

python recipes/studies/sentiment.py
python recipes/studies/sentiment.py --seeds '[0]' --methods '[]'
python recipes/studies/sentiment.py --methods '[dpo, kto, grpo, rloo]'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.intervals import bootstrap_interval, win_rate
from rlhf.rows.jsonl import read_object, read_rows
from rlhf.rows.records import Prompt, read_prompts, read_rankings
from rlhf.run.stages import Manifest
from rlhf_recipes.baseline import baseline
from rlhf_recipes.baseline_config import BaselineConfig, Method
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies.shared_runs import chain, compared
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

MODEL, JUDGE, LEXICON = "reward model", "unseen judge", "lexicon"
LEXICON_FILE = "data/sentiment/sentiment_lexicon.py"
FLUENCY, VARIETY, MOVED = "fluency", "variety", "distance"
LEAST_ACCURACY, LEAST_WON, MOST_NATS, LEAST_VARIETY = 0.75, 0.8, 0.5, 0.8


@dataclass(frozen=True, kw_only=True)
class SentimentConfig(StudyConfig):
    """Settings of the study."""

    baselines: str = "sentiment_trl.yaml"
    """Config of the baselines."""
    methods: list[Method] = field(default_factory=lambda: ["grpo"])
    """Baselines in the table; [] for none."""

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, "baselines": self.baselines}

    def check(self) -> None:
        configs.import_function(f"{LEXICON_FILE}:analyzer")()  # its package may be missing


def run(config: SentimentConfig) -> Iterator[Row]:
    folder = chain(config)
    yield from of_models(folder)
    for method in config.methods:
        argv = ["--config", config.baselines, "--method", method, "--seed", str(config.seed)]
        argv += ["--output_dir", str(folder / method)]
        baseline(configs.load(BaselineConfig, argv, section="baseline", known_sections=SECTIONS))
    table = compared(config, "comparison", policies=config.methods) if config.methods else folder / "evaluation"
    entries = read_object(table / "evaluation.json")
    best = read_object(folder / "evaluation/evaluation.json").get("best_of_n")
    named = {"PPO": entries["ppo"], **{name.upper(): entries[name] for name in config.methods}}
    for name, entry in {**named, **({f"best of {best['n']}": best} if best else {})}.items():
        yield Row(name, entry["win_rate_vs_sft"], None, *entry["win_rate_ci"], entry["prompts"], JUDGE)
        yield Row(name, entry["kl_nats"], n=entry["prompts"], panel=MOVED)
    yield from of_texts(config, folder, table)


def of_models(folder: Path) -> Iterator[Row]:
    """Yield the accuracies on held-out pairs: both reward models', a bag of words', the lexicon's."""
    from reward_models.card.report import report_card

    outputs = {name: Manifest.read(folder / name).outputs for name in ("reward_model", "judge")}
    for name, own in outputs.items():
        yield Row(name.replace("_", " "), own["accuracy"], None, *own["accuracy_ci"], own["n"], MODEL)
    own = outputs["reward_model"]
    yield Row("bag of words", own["bag_of_words_accuracy"], None, *own["bag_of_words_accuracy_ci"], own["n"], MODEL)
    lexicon = configs.import_function(f"{LEXICON_FILE}:lexicon")
    card = report_card(lexicon, read_rankings(folder / "rankings/held_out.jsonl"))
    yield Row(LEXICON, card["accuracy"], None, *card["accuracy_ci"], card["n"], MODEL)


def of_texts(config: SentimentConfig, folder: Path, table: Path) -> Iterator[Row]:
    """Yield what the responses say: the lexicon's win rates, nats per token under the base model, distinct n-grams."""
    samples = [row for _, row in read_rows(table / "samples.jsonl")]
    prompts = {spoken(prompt): prompt for prompt in read_prompts(folder / "data/eval_prompts.jsonl")}
    asked = [prompts[row["prompt"]] for row in samples]
    texts = {name.upper(): [row[name] for row in samples] for name in ("sft", "ppo", *config.methods)}
    texts["human"] = [prompt.columns["continuation"] for prompt in asked]
    lexicon = configs.import_function(f"{LEXICON_FILE}:lexicon")
    begun = [prompt.columns["scored_prefix"] for prompt in asked]
    liked = {name: lexicon(asked, own, scored_prefix=begun) for name, own in texts.items()}
    nats = per_token(str(Manifest.read(folder / "sft").base_model), asked, texts)
    for name, own in texts.items():
        if name not in ("SFT", "human"):
            won = win_rate(liked[name], liked["SFT"])
            yield Row(name, won.value, None, won.low, won.high, len(own), LEXICON)
        found = bootstrap_interval(nats[name], config.seed, bounds=None)
        yield Row(name, found.value, None, found.low, found.high, len(own), FLUENCY)
        yield Row(name, distinct(own, 2), n=len(own), panel=VARIETY)


def spoken(prompt: Prompt) -> str:
    """Return a prompt as an evaluation's samples show it."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.messages)


def per_token(base: str, prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Compute [P] for every policy: each response's mean nats per token under the base model, before any training."""
    import numpy as np
    import torch

    from rlhf import chat
    from rlhf.models.forward import response_logprobs
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.padding import make_batch

    model, tokenizer = load_policy(base).eval(), load_tokenizer(base)
    asked = [chat.encode_prompt(tokenizer, prompt.messages) for prompt in prompts]
    found = {}
    for name, own in texts.items():
        encoded = [chat.encode_response(tokenizer, text) for text in own]
        answers = [ids[:-1] or ids for ids in encoded]  # the end of turn says how long it is, not how fluent
        nats = []
        for start in range(0, len(own), 16):
            rows = slice(start, start + 16)
            batch = make_batch(asked[rows], answers[rows], chat.pad_id(tokenizer), torch.device("cpu"))
            with torch.no_grad():
                logprobs = response_logprobs(model, batch, 1.0)[0]
            nats += (-logprobs.sum(-1) / batch.mask.sum(-1)).tolist()
        found[name] = np.array(nats)
    return found


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct-n (Li et al. 2016): the share of all n-grams of words that are different ones."""
    grams = [tuple(words[k : k + n]) for words in map(str.split, texts) for k in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def margin(panel: str, series: str, least: float, rows: Sequence[Row]) -> float:
    return at(rows, series, panel=panel) - least


def less(panel: str, more: str, most: float, rows: Sequence[Row]) -> float:
    """Return how far PPO stays below SFT's value plus `most`."""
    return at(rows, more, panel=panel) + most - at(rows, "PPO", panel=panel)


STUDY = Study(
    name="sentiment",
    number=14,
    title="Continuing film reviews with positive sentiment",
    claim="After 5,000 comparisons people prefer the fine-tuned model to the zero-shot one 86% of the time.",
    source="Ziegler et al. 2019, section 3.1",
    miniature="SmolLM2-135M with LoRA, a MiniLM reward model; judged by another one, of other pairs, and a lexicon.",
    panels=[
        Panel(MODEL, y="right on held-out pairs"),
        Panel(JUDGE, y="preferred to SFT by the unseen judge"),
        Panel(LEXICON, y="preferred to SFT by the lexicon"),
        Panel(FLUENCY, y="nats per token under the base model"),
        Panel(VARIETY, y="distinct 2-grams"),
        Panel(MOVED, y="KL to SFT, nats"),
    ],
    checks=[
        Check("reward model right on 75% of held-out pairs", partial(margin, MODEL, "reward model", LEAST_ACCURACY)),
        Check(
            "reward model above a bag of words",
            lambda r: at(r, "reward model", panel=MODEL) - at(r, "bag of words", panel=MODEL),
        ),
        Check("PPO over SFT on 80% by the unseen judge", partial(margin, JUDGE, "PPO", LEAST_WON)),
        Check("PPO over SFT on more than half by the lexicon", partial(margin, LEXICON, "PPO", 0.5)),
        Check("fluency: at most half a nat per token above SFT", partial(less, FLUENCY, "SFT", MOST_NATS)),
        Check(
            "variety: at least 80% of SFT's distinct 2-grams",
            lambda r: at(r, "PPO", panel=VARIETY) - LEAST_VARIETY * at(r, "SFT", panel=VARIETY),
        ),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, SentimentConfig, __file__, argv))
