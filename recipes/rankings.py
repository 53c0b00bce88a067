"""Comparisons for the reward model, split by prompt.

    rlhf rankings --config toy.yaml    # its `data:` section
    rlhf rankings --rankings pairs.jsonl --output_dir runs/my/rankings

They are sampled from the SFT model and ranked, or read from a data set. Leaves train.jsonl, held_out.jsonl,
judge.jsonl (a disjoint half of the training prompts, for a second reward model that judges policies) and prompts.jsonl
(for PPO) in --output_dir, or by default in the run's rankings/ folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf import chat
from rlhf import config as configs
from rlhf.calls import own
from rlhf.collection.desk import fitting
from rlhf.errors import InputError
from rlhf.rows.fields import further_columns
from rlhf.rows.mixed import Sources, paths_of
from rlhf.rows.records import (
    Prompt,
    Ranking,
    prompt_key,
    read_prompts,
    read_rankings,
    split_by_prompt,
    split_key,
    write_jsonl,
)
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf_recipes.stage import SECTIONS, from_siblings, next_command, open_stage, with_columns

console.quiet()

Record = TypeVar("Record", Prompt, Ranking)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts and comparisons come from, and how they are split."""

    output_dir: str = "runs/data"
    """As a flag of `rlhf rankings`: where they go. In a chain's `data` section: the run's data folder, and they go into
    rankings/ beside it."""
    seed: int = 0
    """Decides sampling, labels and splits."""
    make: str | None = None
    """A function(folder, seed, **options) that writes the data files first, as file.py:name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `make`."""
    rankings: Sources | None = None
    """Rankings or pairs to read; null: the run's data/rankings.jsonl (and data/prompts.jsonl) where `make` wrote it,
    else sample responses from the SFT model and have `labeler` rank them."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read: refuse: stop and name it; drop: leave it out, and count it in the log."""
    labeler: str | None = None
    """A function(prompts, responses, seed, **columns) -> ranks, as file.py:name; only where rankings is null."""
    prompts: Sources | None = None
    """Prompts to compare on and for PPO; default: the run's data/prompts.jsonl, or those of the rankings."""
    comparisons: int | None = None
    """Prompts that get ranked responses, or (rankings given) rows that are used, drawn with the seed; null: all."""
    responses_per_prompt: int = 4
    """Sampled responses that are ranked together."""
    max_new_tokens: int = 128
    """Longest sampled response."""
    generation_batch_size: int = 256
    """Responses sampled at once."""
    bf16: bool | None = None
    """Sample in bfloat16; null: where the hardware is fast at it."""
    max_row_chars: int | None = None
    """Leave out rankings whose prompt and longest response have more characters; counted in the log."""
    held_out_fraction: float = 0.1
    """Share of the ranked prompts that is kept for measuring accuracy."""
    judge_fraction: float = 0.0
    """Share of the other ranked prompts that trains the second reward model; no other stage sees them."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        for name, least in (
            ("comparisons", 2), ("responses_per_prompt", 2), ("max_new_tokens", 1), ("generation_batch_size", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, where in (
            ("held_out_fraction", 0 < self.held_out_fraction < 1),
            ("judge_fraction", 0 <= self.judge_fraction < 1),
        ):
            if not where:
                raise InputError(f"{name}={getattr(self, name)} must be a share between 0 and 1, say 0.1")


def rankings(config: DataConfig, folder: Path | None = None) -> dict[str, Any]:
    """The stage: get rankings, split them by prompt, write them into a folder; None: rankings/ beside the data's.

    Of several processes the first works, and shares out the sampling."""
    return by_main(lambda: make_rankings(config, folder))


def make_rankings(config: DataConfig, folder: Path | None) -> dict[str, Any]:
    config, sources = inputs(config, folder)
    stage = open_stage("rankings", config, sources)
    if stage.complete:
        return stage.outputs
    if config.rankings is not None:
        ranked = _shortened(read_rankings(config.rankings, on_bad_row=config.on_bad_row), config)
    else:
        ranked = sample_rankings(config, str(sources["model"]), stage.begin)
    rest, held_out = split_by_prompt(ranked, config.held_out_fraction, config.seed)
    train, judge = (
        split_by_prompt(rest, config.judge_fraction, config.seed + 1) if config.judge_fraction else (rest, [])
    )
    prompts = _ppo_prompts(config, train, held_out + judge)
    stage.begin()
    files: dict[str, Sequence[Prompt | Ranking]] = {
        "train": train, "held_out": held_out, "prompts": prompts, "eval_prompts": _prompts_of(held_out),
    }  # fmt: skip
    for name, rows in (files | ({"judge": judge} if judge else {})).items():
        write_jsonl(stage.folder / f"{name}.jsonl", rows)
    outputs = {"train": len(train), "held_out": len(held_out), "judge": len(judge), "ppo_prompts": len(prompts)}
    return stage.finish(outputs | {"pairs": sum(len(r.pairs()) for r in train)})


def inputs(config: DataConfig, folder: Path | None = None) -> tuple[DataConfig, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    run = Path(config.output_dir).parent
    config = replace(with_columns(config, "rankings", "prompts"), output_dir=str(folder or run / "rankings"))
    model: Path | None = None
    if config.rankings is None and (run / "data/rankings.jsonl").is_file():
        config = from_siblings(config, rankings="data/rankings.jsonl", prompts="?data/prompts.jsonl")
    if config.rankings is None:
        config = from_siblings(config, prompts="data/prompts.jsonl")
        model = run / "sft"
        if not model.is_dir():
            raise InputError(f"no earlier stage left {model}, whose responses would be ranked; run `rlhf sft` first")
        if config.labeler is None:
            raise InputError("data.labeler is missing: name a function that ranks, or give data.rankings")
    return config, {"model": model, "rankings": config.rankings, "prompts": config.prompts}


def sample_rankings(config: DataConfig, model: str, begin: Callable[[], None]) -> list[Ranking]:
    """K responses of the SFT model to each prompt, ranked by the labeler; `begin` is called once all is read."""
    import torch

    from rlhf import evaluate, policies
    from rlhf.models import loading as models
    from rlhf.models.positions import check_responses
    from rlhf.sampling.engine import model_stop_ids

    prompts = _drawn(read_prompts(config.prompts, on_bad_row=config.on_bad_row), "prompts", config)
    tokenizer = models.load_tokenizer(model)
    policy = policies.load(model, compute_dtype(config.bf16))
    label = configs.import_function(str(config.labeler))
    encoded = [chat.encode_prompt(tokenizer, p.messages, p.columns) for p in prompts]
    check_responses(policy, encoded, config.max_new_tokens)
    begin()
    stops, rows_at_once = model_stop_ids(policy, tokenizer), config.generation_batch_size
    engine = policies.SharedEngine(policy, stops, chat.pad_id(tokenizer), rows_at_once)
    samples = evaluate.sample_policy(
        prompts,
        tokenizer,
        engine,
        max_new_tokens=config.max_new_tokens,
        generator=torch.Generator(policy.device).manual_seed(config.seed),
        n=config.responses_per_prompt,
    )
    k = config.responses_per_prompt
    responses = [list(samples.responses[i : i + k]) for i in range(0, len(samples.responses), k)]
    rows = ranked_by(label, prompts, responses, config.seed)
    if len(rows) < len(prompts):
        console.stage_line("rankings", f"{len(prompts) - len(rows)} prompts left out: an empty response among theirs")
    return rows


def ranked_by(label: Callable[..., Any], prompts: list[Prompt], responses: list[list[str]], seed: int) -> list[Ranking]:
    """Have a labeler rank each prompt's responses; a prompt with an empty response among them is left out. Raises
    InputError where its ranks don't fit."""
    names = sorted({name for prompt in prompts for name in further_columns(prompt.columns)})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    arguments = own([p.messages for p in prompts]), own(responses)  # copies: it may change what it gets
    ranks = fitting(label(*arguments, seed, **{name: own(values) for name, values in columns.items()}), responses)
    return [
        Ranking(prompt.messages, tuple(texts), order, further_columns(prompt.columns), text=prompt.text)
        for prompt, texts, order in zip(prompts, responses, ranks, strict=True)
        if all(text.strip() for text in texts)
    ]


def _shortened(ranked: list[Ranking], config: DataConfig) -> list[Ranking]:
    """At most `comparisons` rankings, without the over-long ones, drawn with the seed."""
    limit = config.max_row_chars
    kept = [r for r in ranked if limit is None or _chars(r) <= limit]
    if len(kept) < len(ranked):
        console.stage_line(
            "rankings", f"{len(ranked) - len(kept)} of {len(ranked)} rows over max_row_chars={limit} left out"
        )
    if not kept:
        named = ", ".join(paths_of(config.rankings))
        raise InputError(f"{named}: every row has more than max_row_chars={limit} characters; raise it")
    return _drawn(kept, "rankings", config)


def _drawn(records: list[Record], what: str, config: DataConfig) -> list[Record]:
    """Shuffle with the seed and take the first `comparisons`; the log counts what is left out."""
    random.Random(config.seed).shuffle(records)
    if config.comparisons is not None and len(records) > config.comparisons:
        console.stage_line("rankings", f"comparisons={config.comparisons:,} of {len(records):,} {what} drawn")
    return records[: config.comparisons]


def _chars(ranking: Ranking) -> int:
    return sum(len(m["content"]) for m in ranking.prompt) + max(map(len, ranking.responses))


def _ppo_prompts(config: DataConfig, train: list[Ranking], kept_apart: list[Ranking]) -> list[Prompt]:
    """Prompts for PPO: all of `prompts` but those held out, or those of the training rankings."""
    if config.prompts is None:
        return _prompts_of(train)
    groups = set(map(split_key, kept_apart))
    asked = {prompt_key(ranking.prompt) for ranking in kept_apart}
    found = []
    for prompt in read_prompts(config.prompts, on_bad_row=config.on_bad_row):
        group, key = split_key(prompt), prompt_key(prompt.messages)
        grouped = group != key  # and then only prompts of rankings without a group are compared with its own
        if group not in groups and key not in (asked & groups if grouped else asked):
            found.append(prompt)
    return found


def _prompts_of(ranked: list[Ranking]) -> list[Prompt]:
    """The distinct prompts of rankings."""
    return [Prompt(list(r.prompt), r.columns, r.text) for r in {prompt_key(r.prompt): r for r in ranked}.values()]


def main(argv: list[str]) -> None:
    config = configs.load(DataConfig, argv, section="data", known_sections=SECTIONS, description=__doc__ or "")
    named = any(word.partition("=")[0] == "--output_dir" for word in argv)
    folder = Path(config.output_dir) if named else Path(config.output_dir).parent / "rankings"
    rankings(config, folder)
    elsewhere = () if folder.name == "rankings" else ("--train_data", f"{folder}/train.jsonl")
    next_command("reward_model", argv, config.output_dir, also=elsewhere, model="sft")


if __name__ == "__main__":
    configs.run(main)
