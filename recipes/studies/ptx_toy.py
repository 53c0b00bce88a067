"""Study 7: PPO makes the model worse on its pretraining text, and a pretraining mix (ptx) holds that off.

python recipes/studies/ptx_toy.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf import config as configs
from rlhf.rows.jsonl import read_object
from rlhf.run.stages import Manifest
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.studies.shared_runs import WATCHED, chain, compared, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

WITHOUT, WITH = "PPO", "PPO with the mix"
LOSS, GOLD = "loss", "gold"


@dataclass(frozen=True, kw_only=True)
class PtxConfig(StudyConfig):
    """Settings of the study."""

    pretraining_coef: float = 27.8
    """The mix's weight (InstructGPT's)."""
    pretraining_rows: int = 32
    """Documents per optimizer step."""
    kl_coef: float = 0.05
    """Weight of the KL penalty: lower than the chain's, so that there is a tax to pay."""
    updates: int = 20
    """PPO's updates."""


def run(config: PtxConfig) -> Iterator[Row]:
    shared, folders, losses = chain(config, "reward_model"), {}, {}
    for name, out, coef in ((WITHOUT, "ppo_no_mix", 0.0), (WITH, "ppo_mix", config.pretraining_coef)):
        folders[name] = stage(
            config, ppo, PPORecipe, "ppo", out, pretraining_data=str(shared / "data/pretraining.jsonl"),
            pretraining_coef=coef, pretraining_rows=config.pretraining_rows, pretraining_length=160,
            pretraining_held_out=300, kl_coef=config.kl_coef, updates=config.updates, save_steps=0, **WATCHED,
        )  # fmt: skip
        losses[name] = Manifest.read(folders[name]).outputs
    yield Row("SFT", losses[WITHOUT]["pretraining_loss_before"], panel=LOSS)
    for name, found in losses.items():
        yield Row(name, found["pretraining_loss_after"], panel=LOSS)
    judged = compared(config, "compared_mix", policy=str(folders[WITH]), policies=[str(folders[WITHOUT])])
    entries = read_object(judged / "evaluation.json")
    for name, key in (("SFT", "sft"), (WITHOUT, folders[WITHOUT].name), (WITH, "ppo")):
        entry = entries[key]
        yield Row(name, entry["gold_score"], None, *entry["gold_score_ci"], entry["prompts"], GOLD)


def rise(rows: Sequence[Row], name: str) -> float:
    """Return the alignment tax: the loss after PPO less the loss before."""
    return at(rows, name, panel=LOSS) - at(rows, "SFT", panel=LOSS)


STUDY = Study(
    name="ptx_toy",
    number=7,
    title="The alignment tax, and a pretraining mix that lowers it",
    claim="PPO makes the model worse at what it was pretrained for; gradients on pretraining data mixed in lower this "
    "tax and cost little of what PPO gains.",
    source="Ouyang et al. 2022, sections 3.5 and 4.2",
    miniature="The loss on 300 documents of the toy world's pretraining text that are held out of the mix (the base "
    "model has read them), and gold on 400 held-out prompts, after PPO with and without the mix.",
    panels=[Panel(LOSS, y="loss on pretraining text, nats per token"), Panel(GOLD, y="gold score")],
    run=run,
    checks=[
        Check("PPO alone raises the loss on pretraining text", lambda rows: rise(rows, WITHOUT)),
        Check("with the mix it rises less", lambda rows: rise(rows, WITHOUT) - rise(rows, WITH)),
        Check("with the mix gold still rises", lambda rows: at(rows, WITH, panel=GOLD) - at(rows, "SFT", panel=GOLD)),
        Check(
            "with the mix at least half of PPO's gain in gold is kept",
            lambda rows: at(rows, WITH, panel=GOLD) - (at(rows, WITHOUT, panel=GOLD) + at(rows, "SFT", panel=GOLD)) / 2,
        ),
    ],
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, PtxConfig, __file__, argv))
