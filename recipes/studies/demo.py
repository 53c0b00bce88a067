"""The toy chain (what `make demo` runs) on three seeds: README's table.

python recipes/studies/demo.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from rlhf import config as configs
from rlhf.run.stages import Manifest
from rlhf_recipes.studies.shared_runs import chain
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

MODEL, GOLD, WON, MOVED, MINUTES = "reward model", "gold", "comparison", "distance", "time"
BEST = "best of n"


def run(config: StudyConfig) -> Iterator[Row]:
    folder = chain(config)
    outputs = Manifest.read(folder / "evaluation").outputs
    entries, card = outputs["evaluation"], outputs["reward_model"]
    for name, key in (("held-out labels", "accuracy"), ("gold's sign", "gold_accuracy")):
        yield Row(name, card[key], None, *card[f"{key}_ci"], card["prompts"], MODEL)
    rule = Manifest.read(folder / "reward_model").outputs
    yield Row("better length rule", rule["length_baseline"], None, *rule["length_baseline_ci"], rule["prompts"], MODEL)
    for name in ("sft", "ppo"):
        entry = entries[name]
        yield Row(name.upper(), entry["gold_score"], None, *entry["gold_score_ci"], entry["prompts"], GOLD)
    ppo, best = entries["ppo"], entries["best_of_n"]
    for name, entry, key in (
        ("PPO over SFT", ppo, "win_rate"),
        (f"{BEST} over SFT", best, "win_rate"),
        (f"PPO over {BEST}", ppo, "win_rate_vs_best_of_n"),
    ):
        value = entry["win_rate_vs_sft" if key == "win_rate" else key]
        yield Row(name, value, None, *entry[f"{key}_ci"], entry["prompts"], WON)
    yield Row("PPO", ppo["kl_nats"], n=ppo["prompts"], panel=MOVED)
    yield Row("PPO", Manifest.read(folder / "ppo").seconds / 60, panel=MINUTES)


def half(series: str, rows: list[Row]) -> float:
    return at(rows, series, panel=WON) - 0.5


STUDY = Study(
    name="demo",
    number=15,
    title="The toy chain: PPO beats SFT and best-of-n",
    claim="A policy trained by PPO against a learned reward is preferred to its start, and to best-of-n at a like KL.",
    source="Stiennon et al. 2020; Ouyang et al. 2022",
    miniature="make demo: a Llama of 0.75 M parameters; a gold score that no stage trains on judges 400 prompts.",
    panels=[
        Panel(MODEL, y="agreement on held-out pairs"),
        Panel(GOLD, y="gold score"),
        Panel(WON, y="preferred on"),
        Panel(MOVED, y="KL to SFT, nats"),
        Panel(MINUTES, y="minutes, one thread beside other runs"),
    ],
    checks=[
        Check("PPO over SFT on more than half", partial(half, "PPO over SFT")),
        Check(f"PPO over {BEST} on more than half", partial(half, f"PPO over {BEST}")),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StudyConfig, __file__, argv))
